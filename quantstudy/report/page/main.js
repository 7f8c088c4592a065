// The page: what is shown when, and the theme.

/** Show everything that depends on the limits and filters. */
function showRows() {
  showVerdict();
  showTable();
  return showTrade();
}

/** Show everything that depends on the variant or layer that was chosen. */
function showChosen() {
  for (const element of document.querySelectorAll("span.chosen")) element.textContent = state.chosen;
  for (const select of document.querySelectorAll("select.choose")) select.value = state.chosen;
  $("layer").value = state.layer;
  $("baseline").value = state.baseline;
  return Promise.all([showLayers(), showConfusion()]);
}

function choose(name) {
  const focused = document.activeElement?.closest("tr")?.dataset.variant;
  state.chosen = name;
  showRows();
  showChosen();
  if (focused) document.querySelector(`#variants tr[data-variant="${focused}"] button`)?.focus();
}

function chooseLayer(name) {
  const inTable = document.activeElement?.closest("#layer-table") !== null;
  state.layer = name;
  showChosen();
  if (inTable) document.querySelector("#layer-table tr.chosen button")?.focus();
}

function buildStudy() {
  const named = DATA.studies.find((study) => study.study === location.hash.slice(1));
  state.study = named ?? DATA.studies[0];
  state.families = new Set(state.study.variants.map((row) => row.family));
  state.limits = { drop: 1, size: ANY, latency: ANY };
  state.text = "";
  state.baseline = "fp32";
  state.chosen = recommendation().pick?.variant ?? "fp32";
  state.layer = state.study.inputs[0].layer;
  const { study, facts, remarks } = state.study;
  document.title = `${study}: quantization study`;
  replace("title", study);
  replace("studies", DATA.studies.map((other) =>
    h("a", { href: `#${other.study}`, "aria-current": other === state.study ? "page" : null }, other.study)));
  document.querySelector("nav [aria-current]").scrollIntoView({ block: "nearest", inline: "center" });
  replace("facts", Object.entries(facts).flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
  replace("remarks", remarks.map((remark) => h("li", {}, remark)));
  $("remarks").hidden = remarks.length === 0;
  const options = () => state.study.variants.map((row) => h("option", { value: row.variant }, row.variant));
  for (const id of ["choose-layers", "choose-confusion", "baseline"]) replace(id, options());
  buildLimits();
  buildFilters();
  buildLayerOptions();
  showComparison();
  return Promise.all([showRows(), showChosen()]);
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  $("theme").textContent = name === "dark" ? "Light theme" : "Dark theme";
}

async function start() {
  setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  buildTradeFigures();
  buildLayerFigures();
  buildConfusionFigure();
  $("theme").addEventListener("click", () => {
    setTheme(theme() === "dark" ? "light" : "dark");
    buildFilters();
    showRows();
    showChosen();
  });
  $("zoom").addEventListener("change", (event) => { state.zoom = event.target.checked; showTrade(); });
  for (const select of document.querySelectorAll("select.choose")) {
    select.addEventListener("change", (event) => choose(event.target.value));
  }
  $("comparison-all").addEventListener("change", showComparison);
  $("layer").addEventListener("change", (event) => chooseLayer(event.target.value));
  $("baseline").addEventListener("change", (event) => { state.baseline = event.target.value; showConfusion(); });
  window.addEventListener("hashchange", buildStudy);
  await buildStudy();
  document.documentElement.dataset.ready = "true";
}

start();
