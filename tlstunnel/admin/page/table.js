// Tables whose rows are kept: only what has changed is touched, so that focus and reading position stay.

import { h, setText } from "./dom.js";

/** A table. `columns` have a `title`, and `text(row)` or `node(row)`; also `number`, `sort` (a name), `wide` (cut off), `wrap`, `hide`
 * (on a phone). A `tall` one scrolls by itself. `key(row)` names a row. `onOpen(row)` makes the first column a button. `onSort(name)` sorts. */
export class Table {
  constructor({ caption, columns, key, onOpen, onSort, empty, tall = false }) {
    this.columns = columns;
    this.key = key;
    this.onOpen = onOpen;
    this.rows = new Map();
    this.headings = columns.map((column) => this.makeHeading(column, onSort));
    this.body = h("tbody");
    this.empty = h("p", { class: "empty", text: empty ?? "", hidden: true });
    this.table = h("table", {}, h("caption", { class: "unseen", text: caption }), h("thead", {}, h("tr", {}, ...this.headings)), this.body);
    this.frame = h("div", { class: tall ? "scroll tall" : "scroll", role: "group", "aria-label": caption, tabindex: "0" }, this.table);
    this.element = h("div", { class: "table" }, this.frame, this.empty);
  }

  makeHeading(column, onSort) {
    const properties = { scope: "col", class: classes(column) };
    if (!column.sort || !onSort) return h("th", properties, column.title);
    const button = h("button", { type: "button", class: "sort", click: () => onSort(column.sort), text: column.title });
    return h("th", properties, button);
  }

  /** Marks the column that the rows are sorted by. */
  markSorted(name, direction) {
    this.columns.forEach((column, index) => {
      const heading = this.headings[index];
      if (column.sort && column.sort === name) heading.setAttribute("aria-sort", direction);
      else heading.removeAttribute("aria-sort");
    });
  }

  /** Shows these rows, in this order; `empty` is what to say if there are none. */
  update(values, empty) {
    if (empty !== undefined) setText(this.empty, empty);
    this.empty.hidden = values.length > 0;
    this.frame.hidden = values.length === 0;
    const seen = new Set();
    let place = this.body.firstElementChild;
    for (const value of values) {
      const key = String(this.key(value));
      if (seen.has(key)) continue;
      seen.add(key);
      const row = this.rows.get(key) ?? this.addRow(key);
      row.value = value;
      this.fill(row, value);
      if (row.element === place) place = place.nextElementSibling;
      else this.body.insertBefore(row.element, place);
    }
    for (const [key, row] of this.rows) {
      if (seen.has(key)) continue;
      row.element.remove();
      this.rows.delete(key);
    }
  }

  addRow(key) {
    const row = { value: null, cells: [], element: h("tr") };
    this.columns.forEach((column, index) => {
      const cell = h(index === 0 ? "th" : "td", { class: classes(column), scope: index === 0 ? "row" : null });
      let inner = cell;
      if (index === 0 && this.onOpen) {
        inner = h("button", { type: "button", class: "link", click: () => this.onOpen(row.value) });
        cell.append(inner);
      }
      row.cells.push(inner);
      row.element.append(cell);
    });
    this.rows.set(key, row);
    return row;
  }

  fill(row, value) {
    this.columns.forEach((column, index) => {
      const cell = row.cells[index];
      if (column.text) setText(cell, column.text(value));
      else replaceIfDifferent(cell, column.node(value));
      if (column.wide) cell.title = cell.textContent;
    });
  }
}

function classes(column) {
  return [column.number && "number", column.wide && "wide", column.wrap && "wrap", column.hide && "hide"].filter(Boolean).join(" ") || null;
}

function replaceIfDifferent(cell, node) {
  const only = cell.childNodes.length === 1 ? cell.firstChild : null;
  if (only === null || !only.isEqualNode(node)) cell.replaceChildren(node);
}
