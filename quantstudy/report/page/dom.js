// Small helpers: elements, numbers.

const NOTHING = "–";
const $ = (id) => document.getElementById(id);

/** Make an element; `attributes` that begin with "on" are listeners, null and false ones are left out. */
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

function replace(id, ...children) {
  $(id).replaceChildren(...children.flat().filter((child) => child !== null));
}

/** A number with fixed decimals, without a negative zero; a dash for null. */
function fixed(value, decimals) {
  if (value === null || value === undefined) return NOTHING;
  const text = value.toFixed(decimals);
  return Number(text) === 0 ? text.replace("-", "") : text;
}

function significant(value, digits = 3) {
  return value === null || value === undefined ? NOTHING : String(Number(value.toPrecision(digits)));
}

/** Round up to two significant digits, so that a limit admits the value it was made from. */
function roundUp(value) {
  const unit = 10 ** (Math.floor(Math.log10(value)) - 1);
  return Number((Math.ceil(value / unit - 1e-9) * unit).toPrecision(3));
}

/** A number and its noun; a unit in capitals or "ms" has no plural. */
function counted(number, noun) {
  return `${number} ${noun}${number === 1 || noun === "ms" || noun === noun.toUpperCase() ? "" : "s"}`;
}

/** The outline of a family's mark, as in the charts. */
function swatch(family) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "-1 -1 2 2");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", DATA.shapes[family]);
  path.setAttribute("fill", COLORS[theme()][Object.keys(DATA.shapes).indexOf(family)]);
  svg.append(path);
  return svg;
}
