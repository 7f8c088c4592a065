// The limits, the filters and the table of variants.

const COLUMNS = [
  { key: "variant", label: "variant" },
  { key: "kernel_real", label: "kernel", cell: (v) => (v.simulated ? "◌ simulated" : "real") },
  { key: "bits", label: "W/A bits", cell: (v) => v.widths.replace("-", NOTHING) },
  { key: "top1", label: "top-1 %", cell: (v) => `${fixed(v.top1, 2)} ± ${fixed(v.top1_ci95, 2)}` },
  { key: "top1_drop", label: "drop, points", cell: dropCell },
  { key: "agreement", label: "agrees %", cell: (v) => fixed(v.agreement, 1) },
  { key: "size_mb", label: "size, MB", cell: (v) => fixed(v.size_mb, 2) },
  { key: "compression", label: "× smaller", cell: (v) => fixed(v.compression, 2) },
  { key: "latency_ms_b1", label: "ms, batch 1", cell: (v) => latencyCell(v, 1), timed: 1 },
  { key: "latency_ms_b16", label: "ms, batch 16", cell: (v) => latencyCell(v, 16), timed: 16 },
  { key: "speedup_b1", label: "× faster, 1", cell: (v) => fixed(v.speedup_b1, 2) },
  { key: "speedup_b16", label: "× faster, 16", cell: (v) => fixed(v.speedup_b16, 2) },
  { key: "tbops", label: "bit-ops, 10⁹", cell: (v) => significant(v.tbops * 1000) },
  { key: "layers_quantized", label: "layers", cell: (v) => `${v.layers_quantized}/${v.layers_quantizable}` },
];

function latencyCell(variant, batch) {
  return fixed(variant[`latency_ms_b${batch}`], 2) + (isBusy(variant, batch) ? " busy" : "");
}

function dropCell(variant) {
  if (variant.variant === "fp32") return fixed(0, 2);
  return `${fixed(variant.top1_drop, 2)} ± ${fixed(variant.drop_ci95, 2)} (p ${pValue(variant.top1_drop_p)})`;
}

/** Whether the kernel is real, with the layers that run on a real one where only some do. */
function kernelName(variant) {
  const { real = 0, total = 0 } = variant.kernel;
  const share = real > 0 && real < total ? ` (${real}/${total} real)` : "";
  return (variant.simulated ? "◌ simulated" : "real") + share;
}

function sorted(rows) {
  const { key, down } = state.sort;
  if (!key) return rows;
  const compare = (a, b) => {
    if (a[key] === null || b[key] === null) return (a[key] === null) - (b[key] === null);
    const order = typeof a[key] === "string" ? a[key].localeCompare(b[key]) : a[key] - b[key];
    return down ? -order : order;
  };
  return [...rows].sort(compare);
}

function sortBy(key) {
  state.sort = { key, down: state.sort.key === key && !state.sort.down };
  showTable();
  document.querySelector(`#variants thead button[data-key="${key}"]`).focus();
}

function showTable() {
  const pick = recommendation().pick?.variant;
  const rows = sorted(shownVariants());
  const { key, down } = state.sort;
  const header = COLUMNS.map((column) => {
    const on = column.key === key;
    const arrow = on ? (down ? " ▼" : " ▲") : "";
    const button = h("button", { type: "button", "data-key": column.key, onclick: () => sortBy(column.key) }, column.label + arrow);
    return h("th", { scope: "col", "aria-sort": on ? (down ? "descending" : "ascending") : null }, button);
  });
  const body = rows.map((variant) => {
    const chosen = variant.variant === state.chosen;
    const name = h("button", { type: "button", "aria-pressed": String(chosen), onclick: () => choose(variant.variant) }, variant.variant);
    const cells = COLUMNS.slice(1).map((column) =>
      h("td", { class: column.timed && untimed(variant, column.timed) ? "simulated" : null }, column.cell(variant)),
    );
    const classes = [chosen && "chosen", variant.variant === pick && "recommended"].filter(Boolean).join(" ");
    const select = (event) => { if (!event.target.closest("button")) choose(variant.variant); };
    return h("tr", { class: classes || null, "data-variant": variant.variant, onclick: select }, h("th", { scope: "row" }, name), cells);
  });
  replace("variants", h("thead", {}, h("tr", {}, header)), h("tbody", {}, body));
  const all = state.study.variants.length;
  replace("count", rows.length === all ? `${all} variants.` : `${rows.length} of ${all} variants shown.`);
}

function showVerdict() {
  const found = recommendation();
  const text = found.pick ? `: ${found.pick.sentences[state.batch]}. ` : "Nothing here meets these limits.";
  const file = found.pick ? fileOf(state.study, found.pick) : null;
  const named = found.pick ? [h("b", {}, found.pick.variant), text, h("a", { href: file, class: "file" }, file.split("/").pop())] : text;
  replace("verdict", named);
  showShipped();
  replace("reason", reason(state.study, found, state.limits, state.batch, state.prefer));
}

/** What the search found, in the place of a choice among the variants; its limits are the study's goal. */
function showShipped() {
  const ship = state.study.ship;
  $("shipped").hidden = !ship;
  if (!ship) return;
  const { figures } = ship;
  const folder = `../models/${state.study.study}/ship/`;
  const points = `${fixed(figures.top1_drop, 2)} ± ${fixed(figures.top1_drop_ci95, 2)} points`;
  const lost = Math.abs(figures.top1_drop) <= figures.top1_drop_ci95 ? `there is no measurable loss (${points})` : `it loses ${points}`;
  const measured = ship.variant === null ? "" : `; on the test images ${lost}, in ${fixed(figures.size_mb, 2)} MB (${fixed(figures.compression, 2)}× smaller)`;
  const link = ship.variant === null ? null : h("a", { href: `${folder}model.onnx`, class: "file" }, "ship/model.onnx");
  const said = `${ship.sentence[0].toUpperCase()}${ship.sentence.slice(1)}${measured}. `;
  replace("shipped-verdict", said, link);
  const columns = [["candidate", "name"], ["kind", "group"], ["size, MB", "size_mb", 3], ["divergence", "divergence", 4], ["ms", "latency_ms", 2], ["drop, points", "drop", 2], ["images", "images"], ["became", "verdict"]];
  const cell = (trial, [, key, decimals]) => (decimals === undefined ? String(trial[key] ?? "") : fixed(trial[key], decimals));
  const rows = ship.trials.map((trial) =>
    h("tr", { class: trial.name === ship.variant ? "chosen" : null }, columns.map((column, number) => h(number ? "td" : "th", { class: number && column[2] === undefined ? "text" : null, scope: number ? null : "row" }, cell(trial, column)))),
  );
  replace("trials", h("thead", {}, h("tr", {}, columns.map(([label, , decimals]) => h("th", { scope: "col", class: decimals === undefined ? "plain text" : "plain" }, label)))), h("tbody", {}, rows));
}

function slider(name, label, steps, unit) {
  const show = (value) => (value === ANY ? "any" : counted(value, unit));
  const id = `limit-${name}`;
  const output = h("output", { for: id }, show(state.limits[name]));
  const input = h("input", {
    type: "range", id, min: 0, max: steps.length - 1, step: 1, value: steps.indexOf(state.limits[name]),
    "aria-valuetext": show(state.limits[name]),
    oninput: (event) => {
      state.limits[name] = steps[Number(event.target.value)];
      output.textContent = show(state.limits[name]);
      event.target.setAttribute("aria-valuetext", output.textContent);
      showRows();
    },
  });
  return h("div", {}, output, h("label", { for: id }, label), input);
}

function radios(name, legend, options, current, change) {
  const buttons = options.map(([value, label]) =>
    h("label", {}, h("input", { type: "radio", name, value, checked: value === String(current), onchange: () => change(value) }), ` ${label}`),
  );
  return h("fieldset", {}, h("legend", {}, legend), buttons);
}

function buildLimits() {
  const rows = state.study.variants;
  const times = rows.filter((row) => !untimed(row, state.batch) && row[`latency_ms_b${state.batch}`] !== null);
  state.limits.latency = ANY;
  replace(
    "limits",
    slider("drop", "Largest drop of accuracy", DROP_LIMITS, "point"),
    slider("size", "Largest file", limitSteps(rows.map((row) => row.size_mb)), "MB"),
    slider("latency", `Largest latency, batch ${state.batch}`, limitSteps(times.map((row) => row[`latency_ms_b${state.batch}`])), "ms"),
    radios("prefer", "Then the", Object.entries(PREFERENCES), state.prefer, (value) => { state.prefer = value; showRows(); }),
    radios("batch", "Batch of", [["1", "1"], ["16", "16"]], state.batch, (value) => {
      state.batch = Number(value);
      buildLimits();
      document.querySelector(`#limits input[name="batch"][value="${value}"]`).focus();
      showRows();
    }),
  );
}

function checkbox(label, checked, change, mark = null) {
  const input = h("input", { type: "checkbox", checked, onchange: (event) => { change(event.target.checked); showRows(); } });
  return h("label", {}, input, " ", mark, label);
}

function buildFilters() {
  const families = [...new Set(state.study.variants.map((row) => row.family))];
  const chips = families.map((family) =>
    checkbox(family, state.families.has(family), (on) => (on ? state.families.add(family) : state.families.delete(family)), swatch(family)),
  );
  const search = h("input", { type: "search", id: "search", value: state.text, oninput: (event) => { state.text = event.target.value.trim(); showRows(); } });
  replace(
    "filters",
    h("label", {}, "Name contains ", search),
    h("fieldset", {}, h("legend", {}, "Families"), chips),
    checkbox("real kernels only", state.realOnly, (on) => { state.realOnly = on; }),
    checkbox("within the limits above", state.withinLimits, (on) => { state.withinLimits = on; }),
  );
}
