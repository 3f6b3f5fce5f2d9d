// Builds elements. Text is always inserted as text: nothing here, or anywhere else in the page, parses HTML.

const SVG = "http://www.w3.org/2000/svg";

const ICONS = {
  good: "M3 8.5 6.5 12 13 4.5",
  info: "M8 7v5M8 4v.5",
  warn: "M8 4v5M8 11.5v.5",
  bad: "M4.5 4.5l7 7M11.5 4.5l-7 7",
};

/** Returns an element. Of `properties`, functions are listeners, `class` and `text` are what they say, the others
 * attributes; false, null and undefined ones are left out. Children are nodes or texts. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === false || value === null || value === undefined) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else if (name === "class") element.className = value;
    else if (name === "text") element.textContent = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false && child !== ""));
  return element;
}

/** Sets the text of an element if it differs, so that nothing is laid out again, or read out again, in vain. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Returns a decorative icon of a level: good, info, warn or bad. The words beside it say the same. */
export function icon(level) {
  const svg = document.createElementNS(SVG, "svg");
  const path = document.createElementNS(SVG, "path");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("class", `icon ${level}`);
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", ICONS[level] ?? ICONS.info);
  svg.append(path);
  return svg;
}

/** Returns a word with the icon of its level, or without an icon for the level "none". */
export function badge(level, text) {
  return h("span", { class: `badge ${level}` }, level !== "none" && icon(level), text);
}

/** Returns a panel: a section with a heading, what stands beside it, and the content. */
export function panel(title, beside, ...content) {
  const id = `panel-${(panel.number += 1)}`;
  return h(
    "section",
    { class: "panel", "aria-labelledby": id },
    h("div", { class: "panel-head" }, h("h2", { id, text: title }), beside),
    ...content,
  );
}

panel.number = 0;

/** Returns a form whose controls filter a table; `act` is called when one of them has changed. */
export function filterForm(label, act, ...controls) {
  return h("form", { class: "filters", role: "search", "aria-label": label, submit: (event) => event.preventDefault(), input: whenTyped(act) }, ...controls);
}

/** Returns a labelled field of a form. */
export function field(label, control, note = "") {
  return h("label", { class: "field" }, h("span", { text: label }), control, note && h("small", { text: note }));
}

/** Returns a list of names and values; empty values are left out. */
export function facts(pairs) {
  const shown = pairs.filter(([, value]) => value !== "" && value !== null && value !== undefined);
  return h("dl", { class: "facts" }, ...shown.flatMap(([name, value]) => [h("dt", { text: name }), h("dd", {}, value)]));
}

/** Calls `act` when nothing was typed for a moment. */
export function whenTyped(act, delay = 250) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(act, delay);
  };
}
