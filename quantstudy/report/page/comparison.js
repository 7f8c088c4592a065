// What moved since another revision; the section is there only in the page of a comparison.

function showComparison() {
  const compared = DATA.comparison;
  $("comparison").hidden = compared === null;
  if (compared === null) return;
  const rows = compared.rows.filter((row) => row.study === state.study.study);
  const moved = rows.filter((row) => row.verdict !== "same");
  replace("comparison-title", `What moved since ${compared.before}`);
  replace("comparison-verdict", `${moved.length} of ${counted(rows.length, "variant")}` +
    (moved.length ? `: ${moved.map((row) => `${row.variant} ${row.verdict}`).join(", ")}.` : "."));
  replace("comparison-params", compared.params.map(([key, before, after]) => h("li", {}, `${key}: ${before} → ${after}`)));
  $("comparison-params").hidden = compared.params.length === 0;
  const shown = $("comparison-all").checked ? rows : moved;
  const heads = ["variant", "top-1 %", "change", "p", "size MB", "ms, batch 1", "ms, batch 16", "verdict"];
  replace("comparison-table",
    h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col", class: "plain" }, head)))),
    h("tbody", {}, shown.map(comparedRow)));
  document.querySelector("#comparison .scroll").hidden = shown.length === 0;
  replace("comparison-reading", compared.reading);
}

function comparedRow(row) {
  const both = (key, decimals = 2) => {
    const shown = (side) => fixed(side[key], decimals) + (isBusy(side, key.split("latency_ms_b")[1]) ? " busy" : "");
    const [before, after] = [row.before, row.after].map((side) => (side ? shown(side) : NOTHING));
    return before === after ? after : `${before} → ${after}`;
  };
  const change = row.before && row.after ? row.after.top1 - row.before.top1 : null;
  const cells = [both("top1"), (change > 0 ? "+" : "") + fixed(change, 2), pValue(row.p), both("size_mb"), both("latency_ms_b1"),
    both("latency_ms_b16"), row.verdict];
  return h("tr", {}, h("th", { scope: "row" }, row.variant), cells.map((cell) => h("td", {}, cell)));
}
