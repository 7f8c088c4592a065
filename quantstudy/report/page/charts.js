// Drawing: the theme's colours, and the charts of accuracy against cost.

const COLORS = {
  light: ["#000000", "#3a9bd9", "#0072B2", "#00855F", "#C04E00", "#B0568A", "#B87A00", "#6b6b6b"],
  dark: ["#ffffff", "#7cc4f2", "#4f9fe0", "#35c796", "#ff8a4c", "#e79cc4", "#f0b429", "#a9a9a9"],
};
const PAIRS = {
  light: ["#C04E00", "#0072B2", "#00855F", "#B0568A", "#B87A00", "#6b6b6b"],
  dark: ["#ff8a4c", "#4f9fe0", "#35c796", "#e79cc4", "#f0b429", "#a9a9a9"],
};
const ERRORS_ALONE = 1; // Vega's level; a layer of a chart may be empty, of which it warns
const views = new Map();

function theme() {
  return document.documentElement.dataset.theme;
}

function chartConfig() {
  const style = getComputedStyle(document.documentElement);
  const [ink, muted, line] = ["--ink", "--muted", "--line"].map((name) => style.getPropertyValue(name).trim());
  return {
    background: null,
    font: getComputedStyle(document.body).fontFamily,
    view: { stroke: null },
    range: { category: COLORS[theme()], ordinal: PAIRS[theme()], heatmap: { scheme: theme() === "dark" ? "inferno" : "orangered" } },
    axis: { labelColor: muted, titleColor: muted, gridColor: line, domainColor: line, tickColor: line, titleFontWeight: 400, labelFontSize: 12, titleFontSize: 12 },
    legend: { labelColor: ink, titleColor: muted, labelFontSize: 12, titleFontSize: 12, titleFontWeight: 400 },
    text: { fill: ink, fontSize: 12 },
    rect: { fill: muted },
  };
}

/** Draw a chart of the page with these rows, or hand them to the one that stands there; `height` is in pixels. */
async function draw(place, chart, datasets, onClick = null, height = DATA.charts[chart].height) {
  const empty = Object.values(datasets).every((rows) => rows.length === 0);
  $(place).classList.toggle("empty", empty);
  if (empty) return;
  const existing = views.get(place);
  if (existing?.theme === theme()) {
    const view = (await existing.embedded).view;
    if (height) view.height(height);
    for (const [name, rows] of Object.entries(datasets)) view.data(name, rows);
    await view.resize().runAsync();
    return;
  }
  const specification = { ...DATA.charts[chart], datasets, height, autosize: { type: "fit-x", contains: "padding" } };
  const embedded = vegaEmbed($(place), specification, {
    actions: false, renderer: "svg", config: chartConfig(), tooltip: { theme: theme() },
    logLevel: ERRORS_ALONE,
  });
  views.set(place, { theme: theme(), embedded });
  const { view } = await embedded;
  if (onClick) view.addEventListener("click", (_, item) => item?.datum && onClick(item.datum));
}

function figure(id, title, note, label) {
  return h("figure", { id: `${id}-figure` }, h("figcaption", {}, title, note ? h("small", {}, note) : null), h("div", { role: "img", "aria-label": label }, h("div", { class: "chart", id, "aria-hidden": "true" })));
}

function buildTradeFigures() {
  const table = "the same figures are in the table of variants";
  replace("trade",
    figure("chart-size", "Accuracy and size", null, `Top-1 accuracy against file size; ${table}`),
    figure("chart-latency", "Accuracy and latency", null, `Top-1 accuracy against latency; ${table}`),
    figure("chart-operations", "Accuracy and bit-operations", null, `Top-1 accuracy against bit-operations; ${table}`),
    figure("chart-scaling", "Scaling law", "the same schemes, rounded after training and trained", `Top-1 accuracy over the bits of a weight; ${table}`),
  );
}

/** The rows of a trade-off chart: those shown that have this cost, and whether a name fits on their right. */
function tradeRows(cost, timed, scale = 1) {
  const floor = state.zoom && state.study.axis_floor !== null ? state.study.axis_floor : -1;
  const pick = recommendation().pick?.variant;
  const rows = shownVariants().filter((row) => row[cost] !== null && row.top1 > floor);
  const logs = rows.map((row) => Math.log(row[cost]));
  const middle = (Math.min(...logs) + Math.max(...logs)) / 2;
  return rows.map((row) => ({
    ...row,
    cost: row[cost] * scale,
    cost_low: (row[`${cost}_low`] ?? row[cost]) * scale,
    cost_high: (row[`${cost}_high`] ?? row[cost]) * scale,
    on_front: row[`front_${cost}`],
    hollow: timed && untimed(row, state.batch),
    chosen: row.variant === state.chosen,
    recommended: row.variant === pick,
    on_the_right: Math.log(row[cost]) > middle,
    kernel_name: kernelName(row),
  }));
}

function scalingPoints() {
  const shown = new Set(shownVariants().map((row) => row.variant));
  const names = { PTQ: "without training (PTQ)", QAT: "with training (QAT)" };
  return state.study.scaling_law
    .filter((row) => shown.has(row.variant))
    .map((row) => ({ ...row, training: names[row.training], chosen: row.variant === state.chosen }));
}

function showTrade() {
  const byName = (datum) => datum.variant && choose(datum.variant);
  const latency = `latency_ms_b${state.batch}`;
  document.querySelector("#chart-latency-figure figcaption").textContent = `Accuracy and latency of a batch of ${state.batch}`;
  const floor = state.study.axis_floor;
  const collapsed = floor === null ? [] : state.study.variants.filter((row) => row.top1 <= floor).map((row) => row.variant);
  $("zoom").closest("p").hidden = collapsed.length === 0;
  replace("collapsed", collapsed.length ? `below ${fixed(floor, 0)} %: ${collapsed.join(", ")}` : "");
  return Promise.all([
    draw("chart-size", "size", { variants: tradeRows("size_mb", false) }, byName),
    draw("chart-latency", "latency", { variants: tradeRows(latency, true) }, byName),
    draw("chart-operations", "operations", { variants: tradeRows("tbops", false, 1000) }, byName),
    draw("chart-scaling", "scaling", { points: scalingPoints() }, byName),
  ]);
}
