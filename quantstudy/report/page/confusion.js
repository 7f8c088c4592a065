// Which classes and images a variant gets wrong that another one gets right.

const MOST_CLASSES = 20;
const MOST_IMAGES = 60;

/** Return the test images that only one of the two gets right, and those that both get wrong differently. */
function changes() {
  const labels = state.study.labels.split(" ").map(Number);
  const [before, after] = [predictionsOf(state.baseline), predictionsOf(state.chosen)];
  const found = { labels, before, after, lost: [], gained: [], moved: [] };
  labels.forEach((label, i) => {
    if (before[i] === label && after[i] !== label) found.lost.push(i);
    else if (before[i] !== label && after[i] === label) found.gained.push(i);
    else if (before[i] !== after[i]) found.moved.push(i);
  });
  return found;
}

/** McNemar's exact two-sided p-value for two counts of disagreements. */
function mcnemar(a, b) {
  const n = a + b;
  let logTerm = -n * Math.log(2);
  let total = 0;
  for (let i = 0; i <= Math.min(a, b); i++) {
    total += Math.exp(logTerm);
    logTerm += Math.log(n - i) - Math.log(i + 1);
  }
  return Math.min(1, 2 * total);
}

function classRows(found) {
  const counts = new Map();
  const add = (index, key) => {
    const row = counts.get(found.labels[index]) ?? { lost: 0, gained: 0 };
    row[key] += 1;
    counts.set(found.labels[index], row);
  };
  found.lost.forEach((index) => add(index, "lost"));
  found.gained.forEach((index) => add(index, "gained"));
  const changed = [...counts].sort((a, b) => b[1].lost - a[1].lost || b[1].gained - a[1].gained).slice(0, MOST_CLASSES);
  return changed.flatMap(([label, { lost, gained }]) => [
    { name: state.study.classes[label], change: "lost", images: -lost },
    { name: state.study.classes[label], change: "gained", images: gained },
  ]);
}

function thumbnail(index, label) {
  const { side, grey } = state.study.thumbnails;
  state.study.pixels ??= Uint8Array.from(atob(grey), (char) => char.charCodeAt(0));
  const canvas = h("canvas", { width: side, height: side, role: "img", "aria-label": label });
  const image = new ImageData(side, side);
  for (let i = 0; i < side * side; i++) {
    image.data.fill(state.study.pixels[index * side * side + i], 4 * i, 4 * i + 3);
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

function gallery(title, indices, found) {
  if (!indices.length) return null;
  const name = (index) => state.study.classes[index];
  const items = indices.slice(0, MOST_IMAGES).map((i) => {
    const text = `${name(found.before[i])} → ${name(found.after[i])}`;
    const label = `test image ${i}: ${name(found.labels[i])}`;
    return h("li", { title: label }, state.study.thumbnails ? thumbnail(i, label) : `#${i} ${name(found.labels[i])}: `, text);
  });
  const more = indices.length > MOST_IMAGES ? h("p", { class: "muted" }, `and ${indices.length - MOST_IMAGES} more`) : null;
  return h("div", {}, h("h3", {}, `${title} (${indices.length})`), h("ul", { class: "gallery" }, items), more);
}

function buildConfusionFigure() {
  replace("confusion", figure("chart-classes", "Classes that change", `at most ${MOST_CLASSES}, most lost first`, "Images lost and gained by class; the images are listed below"));
}

function showConfusion() {
  const found = changes();
  const same = state.baseline === state.chosen;
  const p = mcnemar(found.lost.length, found.gained.length);
  replace("agreement", same ? "Choose two different variants." :
    `${state.chosen} gets ${counted(found.lost.length, "image")} wrong that ${state.baseline} gets right, and ` +
    `${found.gained.length} the other way round; both get ${found.moved.length} more wrong, each in its own way. ` +
    `McNemar's exact p ${pValue(p)}, of ${found.labels.length} test images.`);
  replace("galleries", [
    gallery(`Lost: right with ${state.baseline}, wrong with ${state.chosen}`, found.lost, found),
    gallery(`Gained: wrong with ${state.baseline}, right with ${state.chosen}`, found.gained, found),
    state.study.thumbnails || same ? null : h("p", { class: "muted" }, "No thumbnails: the licence of these images does not let a page carry them."),
  ].filter(Boolean));
  const rows = classRows(found);
  $("chart-classes-figure").hidden = rows.length === 0;
  return rows.length ? draw("chart-classes", "classes", { classes: rows }, null, 10 * rows.length + 10) : null;
}
