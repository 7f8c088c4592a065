// What the reader chose, and the studies.

const DATA = JSON.parse($("data").textContent);

const state = {
  study: DATA.studies[0],
  chosen: null,
  layer: null,
  baseline: "fp32",
  batch: 16,
  prefer: "speed",
  limits: { drop: 1, size: ANY, latency: ANY },
  text: "",
  families: new Set(),
  realOnly: false,
  withinLimits: false,
  zoom: true,
  sort: { key: null, down: false },
};

function variantOf(name) {
  return state.study.variants.find((variant) => variant.variant === name);
}

function recommendation() {
  return recommend(state.study, state.limits, state.batch, state.prefer);
}

/** The rows that the filters leave, in the order of params.yaml. */
function shownVariants() {
  return state.study.variants.filter(
    (row) =>
      row.variant.includes(state.text) &&
      state.families.has(row.family) &&
      !(state.realOnly && row.simulated) &&
      !(state.withinLimits && !meets(row, state.limits, state.batch)),
  );
}

/** Class indices that a variant predicts, one a test image. */
function predictionsOf(name) {
  return state.study.predictions[name].split(" ").map(Number);
}
