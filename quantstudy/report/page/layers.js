// Layer by layer: bits, SQNR, shares, sensitivity, and the histogram of a layer's input.

function layerRows() {
  const columns = state.study.layers[state.chosen];
  const total = (key) => columns[key].reduce((sum, value) => sum + (value ?? 0), 0);
  const [bytes, macs] = [total("bytes"), total("macs")];
  return columns.name.map((layer, i) => ({
    layer,
    index: i + 1,
    bits: `${columns.weight[i]}/${columns.activation[i]}`,
    real: columns.real[i],
    sqnr_db: columns.sqnr_db[i],
    bytes: columns.bytes[i] === null ? null : columns.bytes[i] / bytes,
    macs: columns.macs[i] / macs,
    chosen: layer === state.layer,
  }));
}

function buildLayerFigures() {
  const table = "the same figures are in the table of layers below";
  replace("layers",
    figure("chart-shares", "Where the bytes and the arithmetic are", null, `Share of bytes and multiply-accumulates by layer; ${table}`),
    figure("chart-sqnr", "How far each layer is from fp32", "all layers before it quantized too, in simulated arithmetic, 16 test images", `SQNR of each layer's output; ${table}`),
    figure("chart-histogram", "Input of the layer", null, "Histogram of the layer's input on calibration images, with clip thresholds"),
    figure("chart-sensitivity", "Sensitivity", "accuracy lost when that layer alone has fewer bits", "Accuracy lost by layer and bits"),
  );
}

function buildLayerOptions() {
  replace("layer", state.study.inputs.map(({ layer }) => h("option", { value: layer }, layer)));
}

function showLayers() {
  const rows = layerRows();
  const pickLayer = (datum) => datum.layer && chooseLayer(datum.layer);
  const shares = rows.flatMap((row) => [
    ...(row.bytes === null ? [] : [{ ...row, of: "bytes", share: row.bytes }]),
    { ...row, of: "multiply-accumulates", share: row.macs },
  ]);
  const measured = rows.filter((row) => row.sqnr_db !== null);
  const sensitivity = sensitivityRows(rows);
  const missing = [
    rows.length && rows.every((row) => row.bytes === null) ? "the bytes of each layer" : null,
    measured.length || state.chosen === "fp32" || variantOf(state.chosen).settings.equalize ? null : "the SQNR of each layer",
    sensitivity.length ? null : "sensitivity",
  ].filter(Boolean);
  $("chart-shares-figure").hidden = rows.length === 0;
  $("chart-sqnr-figure").hidden = measured.length === 0;
  $("chart-sensitivity-figure").hidden = sensitivity.length === 0;
  document.querySelector("#chart-sensitivity-figure small").textContent = "accuracy lost when that layer alone has fewer bits" +
    (state.study.sensitivity_is_of_this_run ? "" : "; of an earlier run, this study is not in budget.studies");
  replace("not-taken", missing.length ? `Not taken in this run: ${missing.join(", ")}.` : "");
  showLayerTable(rows);
  return Promise.all([
    rows.length ? draw("chart-shares", "shares", { shares }, pickLayer) : null,
    measured.length ? draw("chart-sqnr", "sqnr", { layers: measured }, pickLayer) : null,
    sensitivity.length ? draw("chart-sensitivity", "sensitivity", { sensitivity }, pickLayer) : null,
    showHistogram(),
  ]);
}

function sensitivityRows(rows) {
  const index = new Map(rows.map((row) => [row.layer, row.index]));
  return state.study.sensitivity
    .filter((row) => index.has(row.layer))
    .map((row) => ({ ...row, index: index.get(row.layer) }));
}

function showHistogram() {
  const input = state.study.inputs.find((row) => row.layer === state.layer);
  document.querySelector("#chart-histogram-figure").hidden = !input;
  if (!input) return null; // the layer never ran in calibration
  const floor = Math.min(...input.shares.filter((share) => share > 0)) / 2;
  const bins = input.shares
    .map((share, i) => ({ low: input.edges[i], high: input.edges[i + 1], share, floor }))
    .filter((bin) => bin.share > 0);
  const clip = input.clips[state.chosen];
  const ends = Object.entries(input.percentiles).map(([percentile, range]) => [`${percentile} %`, range.low, range.high]);
  if (clip) ends.push([state.chosen, ...clip]);
  const thresholds = ends.flatMap(([label, low, high]) => [{ label, value: low }, { label, value: high }]);
  const facts = [
    `mean ${significant(input.mean)}, standard deviation ${significant(input.std)}`,
    input.kurtosis === null ? null : `kurtosis ${significant(input.kurtosis)}`,
    clip ? `${state.chosen} keeps ${significant(clip[0])} to ${significant(clip[1])}` : `${state.chosen} has no range from calibration`,
  ].filter(Boolean);
  document.querySelector("#chart-histogram-figure figcaption").replaceChildren(
    `Input of ${state.layer}`, h("small", {}, facts.join("; ")));
  return draw("chart-histogram", "histogram", { bins, thresholds });
}

function showLayerTable(rows) {
  const share = (value) => (value === null ? h("td", {}, NOTHING)
    : h("td", { class: "bar", style: `--share: ${(100 * value).toFixed(1)}%` }, `${fixed(100 * value, 1)} %`));
  const lost = new Map();
  for (const row of state.study.sensitivity) {
    lost.set(row.layer, [...(lost.get(row.layer) ?? []), `${row.bits} bits: ${fixed(row.top1_drop, 2)}`]);
  }
  const labels = ["layer", "W/A bits", "kernel", "SQNR, dB", "bytes", "MACs", ...(lost.size ? ["points lost alone"] : [])];
  const header = labels.map((label) => h("th", { scope: "col", class: "plain" }, label));
  const body = rows.map((row) =>
    h("tr", { class: row.chosen ? "chosen" : null },
      h("th", { scope: "row" }, h("button", { type: "button", "aria-pressed": String(row.chosen), onclick: () => chooseLayer(row.layer) }, row.layer)),
      h("td", {}, row.bits), h("td", {}, row.real ? "real" : "◌ simulated"), h("td", {}, fixed(row.sqnr_db, 1)),
      share(row.bytes), share(row.macs),
      lost.size ? h("td", {}, (lost.get(row.layer) ?? []).join("; ")) : null));
  replace("layer-table", h("thead", {}, h("tr", {}, header)), h("tbody", {}, body));
}
