// Which variant to take under the reader's limits.

const SAME_SIZE = 0.01;
const SAME_TIME = 0.05;
const MOST_SAME_TIME = 0.2;
const ANY = Infinity;
const DROP_LIMITS = [0, 0.1, 0.2, 0.5, 1, 2, 5, 10, ANY];
const PREFERENCES = { speed: "fastest", size: "smallest", accuracy: "most accurate" };

/** The steps of a slider: each variant's own value, rounded up, then no limit. */
function limitSteps(values) {
  return [...new Set(values.map(roundUp))].sort((a, b) => a - b).concat(ANY);
}

/** Whether a latency says nothing: a simulated kernel's, or one that was taken while the machine was busy. */
function untimed(row, batch) {
  return row.simulated || isBusy(row, batch);
}

function isBusy(row, batch) {
  return (row.busy ?? []).includes(Number(batch));
}

/**
 * What a variant lost, and half the width of its 95 % interval: on validation images, so that test images choose nothing.
 * A study without validation images leaves only the test images.
 */
function judged(row) {
  const { validation_drop: drop, validation_drop_ci95: noise } = row;
  return (drop ?? null) === null ? { drop: row.top1_drop, noise: row.drop_ci95 ?? 0 } : { drop, noise };
}

/** A latency that says nothing meets no limit of latency. */
function meets(variant, limits, batch) {
  const latency = variant[`latency_ms_b${batch}`];
  return (
    judged(variant).drop <= limits.drop + 1e-9 &&
    variant.size_mb <= limits.size &&
    (limits.latency === ANY || (!untimed(variant, batch) && latency !== null && latency <= limits.latency))
  );
}

/** Keep the rows whose drop may be as small as that of any other: their 95 % intervals overlap. */
function alikeInAccuracy(rows) {
  const best = Math.min(...rows.map(judged).map(({ drop, noise }) => drop + noise));
  return rows.filter((row) => judged(row).drop - judged(row).noise <= best + 1e-9);
}

/** Keep the rows within a share `tolerance` of the smallest value of `of`. */
function nearSmallest(rows, of, tolerance) {
  const smallest = Math.min(...rows.map(of));
  return rows.filter((row) => of(row) <= smallest + Math.abs(smallest) * tolerance + 1e-9);
}

/**
 * The share by which speeds must differ: as much as fp32's own timings, one beside each variant, lie apart, within
 * bounds: a speed-up is taken in one process, where part of that cancels.
 */
function sameTime(study, batch) {
  return Math.min(MOST_SAME_TIME, Math.max(SAME_TIME, study.timing_spread[batch]));
}

/**
 * Return {pick, meeting}: the variant of a study to take, or null, and all that meet the limits.
 * Values nearly equal count as equal, and drops that noise explains; then what is exported, untrained and simpler is
 * preferred, then size decides, then what speed was measured.
 */
function recommend(study, limits, batch, prefer) {
  const meeting = study.variants.filter((variant) => meets(variant, limits, batch));
  // Beside fp32 in the same process, so that how busy the machine was at the time of one variant does not choose.
  const time = (row) => (untimed(row, batch) ? ANY : 1 / (row[`speedup_b${batch}`] ?? 0));
  const goals = {
    speed: (rows) => nearSmallest(rows.filter((row) => time(row) < ANY), time, sameTime(study, batch)),
    accuracy: alikeInAccuracy,
    exported: (rows) => nearSmallest(rows, (row) => Number(!row.exported), 0),
    untrained: (rows) => nearSmallest(rows, (row) => Number(row.trained ?? false), 0),
    simpler: (rows) => nearSmallest(rows, (row) => Number(row.group === "outlier"), 0),
    size: (rows) => nearSmallest(rows, (row) => row.size_mb, SAME_SIZE),
  };
  let left = goals[prefer](meeting);
  for (const goal of ["accuracy", "exported", "untrained", "simpler", "size"]) left = left.length ? goals[goal](left) : left;
  const quicker = (best, row) => (best === null || time(row) < time(best) ? row : best);
  return { pick: left.reduce(quicker, null), meeting };
}

/** Say what the limits are and how many variants meet them. */
function reason(study, found, limits, batch, prefer) {
  const words = [
    limits.drop === ANY ? null : `lose at most ${counted(limits.drop, "point")}`,
    limits.size === ANY ? null : `take at most ${limits.size} MB`,
    limits.latency === ANY ? null : `answer a batch of ${batch} within ${limits.latency} ms on a real kernel`,
  ].filter(Boolean);
  const limited = words.length ? ` that ${words.join(" and ")}` : "";
  if (!found.pick && found.meeting.length) return `No variant${limited} was timed on a real kernel. Move a limit.`;
  if (!found.pick) return `No variant can ${words.join(" and ")}. ${inTheWay(study, limits, batch)}`;
  const others = found.meeting.length - 1;
  const why = study.timing_spread[batch] > SAME_TIME ? ": fp32's own timings here lie that far apart" : "";
  const equal = prefer === "speed" ? ` Speeds within ${Math.round(100 * sameTime(study, batch))} % count as equal${why}.` : "";
  const images = found.pick.validation_images;
  const given = study.weights_were_given ? " Whether these trained the given weights is not known here." : "";
  const chosen = images ? `Chosen by its drop on ${images} validation images.${given}` : "Chosen by test images: this study has no validation images.";
  return `The ${PREFERENCES[prefer]} of ${counted(others + 1, "variant")}${limited}. ${chosen} p ${pValue(found.pick.top1_drop_p)} against fp32 on the test images.${equal}`;
}

/** Say which limit alone, lifted, would let a variant through. */
function inTheWay(study, limits, batch) {
  const names = { drop: "the drop", size: "the size", latency: "the latency" };
  const free = Object.keys(names).filter((name) => {
    const without = { ...limits, [name]: ANY };
    return limits[name] !== ANY && study.variants.some((variant) => meets(variant, without, batch));
  });
  if (!free.length) return "No limit is in the way alone: move two of them.";
  return `In the way is the limit of ${free.map((name) => names[name]).join(", or that of ")}.`;
}

/** The file of a variant to deploy, from where the page lies. */
function fileOf(study, variant) {
  const folder = `../models/${study.study}`;
  return variant.exported ? `${folder}/onnx/${variant.variant}.onnx` : `${folder}/${variant.variant}.pth`;
}

function pValue(p) {
  return p === null ? NOTHING : p < 0.001 ? "<0.001" : p.toFixed(3);
}
