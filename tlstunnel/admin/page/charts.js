// Charts: a plot, a sentence that sums it up, and the same values as a table.

import { h, setText } from "./dom.js";
import { moment, time } from "./format.js";

const HEIGHT = 190;
const MOST_ROWS = 30;

const charts = new Set();

/** Draws all charts again, in the colours of another theme. */
export function redrawAll() {
  for (const chart of charts) chart.repaint();
}

/** A chart of series over time. Each has a `label`; `format` renders their values; `summarise(data, series)` makes the sentence.
 * A value of null is a gap. */
export class Chart {
  constructor({ title, note = "", series, format, summarise, empty }) {
    this.title = title;
    this.format = format;
    this.series = series;
    this.summarise = summarise;
    this.data = [[], ...series.map(() => [])];
    this.span = null;
    this.plot = null;
    this.waiting = false;
    this.legend = series.map((one, index) => {
      const swatch = h("span", { class: `swatch c${index + 1}${one.dashed ? " dashed" : ""}` });
      const value = h("output", { class: "number" });
      return { swatch, value, element: h("span", { class: "legend-item" }, swatch, one.label, value) };
    });
    this.canvas = h("div", { class: "plot", "aria-hidden": "true" });
    this.line = h("span", { class: "grid-line", hidden: true }); // it has the colour of the grid
    this.empty = h("p", { class: "empty", text: empty ?? "Nothing was measured yet." });
    this.summary = h("p", { class: "summary" });
    this.rows = h("tbody");
    this.details = h(
      "details",
      { toggle: () => this.fillTable() },
      h("summary", {}, "Show as a table", h("span", { class: "unseen", text: `: ${title}` })),
      h("div", { class: "scroll", role: "group", "aria-label": `${title}, as a table`, tabindex: "0" },
        h("table", {},
          h("caption", { class: "unseen", text: title }),
          h("thead", {}, h("tr", {}, h("th", { scope: "col", text: "Time" }), ...series.map((one) => h("th", { scope: "col", class: "number", text: one.label })))),
          this.rows,
        ),
      ),
    );
    this.heading = h("h3", { text: title });
    this.note = h("span", { class: "note", text: note });
    this.element = h(
      "figure",
      { class: "chart" },
      h("figcaption", {}, h("div", {}, this.heading, this.note), h("div", { class: "legend", "aria-hidden": "true" }, ...this.legend.map((item) => item.element))),
      this.canvas,
      this.line,
      this.empty,
      this.summary,
      this.details,
    );
    new ResizeObserver(() => this.resize()).observe(this.canvas);
    charts.add(this);
  }

  /** Shows `data`: times, then the values of each series; from `span[0]` to `span[1]` in Unix time. */
  update(data, span) {
    this.data = data;
    this.span = span;
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.draw();
    });
  }

  /** Says what is measured, beside the title. */
  annotate(text) {
    setText(this.note, text);
  }

  draw() {
    const known = this.data.slice(1).some((values) => values.some((value) => value !== null));
    this.empty.hidden = known;
    this.canvas.hidden = !known;
    this.details.hidden = !known;
    for (const [index, item] of this.legend.entries()) item.element.hidden = this.data[index + 1].every((value) => value === null);
    setText(this.summary, known ? this.summarise(this.data, this.series) : "");
    if (!known || this.canvas.clientWidth === 0) return;
    if (this.plot === null) this.plot = this.create();
    this.plot.setData(this.data, false);
    this.plot.batch(() => {
      this.plot.setScale("x", { min: this.span[0], max: this.span[1] });
    });
    this.showValues(this.plot.cursor.idx);
    this.fillTable();
  }

  create() {
    const color = (element) => getComputedStyle(element).color;
    const axis = { stroke: () => color(this.summary), grid: { stroke: () => color(this.line), width: 1 }, ticks: { show: false } };
    const font = `11px ${getComputedStyle(document.body).fontFamily}`;
    return new uPlot(
      {
        width: this.canvas.clientWidth,
        height: HEIGHT,
        legend: { show: false },
        cursor: { y: false, drag: { x: false, y: false }, points: { size: 6 } },
        scales: { x: { time: true, auto: false }, y: { range: (_, low, high) => [Math.min(0, low ?? 0), high > 0 ? high * 1.1 : 1] } },
        axes: [
          { ...axis, font, size: 28, space: 70, values: timeLabels },
          { ...axis, font, size: 62, space: 36, values: (_, values) => values.map((value) => this.format(value)) },
        ],
        series: [
          {},
          ...this.series.map((one, index) => ({
            label: one.label,
            stroke: () => color(this.legend[index].swatch),
            width: 1.5,
            dash: one.dashed ? [5, 4] : undefined,
            points: { show: (plot) => plot.data[0].length < 3 },
            spanGaps: false,
          })),
        ],
        hooks: { setCursor: [(plot) => this.showValues(plot.cursor.idx)] },
      },
      this.data,
      this.canvas,
    );
  }

  /** Shows the values under the cursor, or else the latest. */
  showValues(index) {
    const place = index ?? this.data[0].length - 1;
    this.legend.forEach((item, number) => setText(item.value, this.format(this.data[number + 1][place] ?? null)));
  }

  fillTable() {
    if (!this.details.open) return;
    const format = this.span && this.span[1] - this.span[0] > 86_400 ? moment : time;
    const step = Math.max(1, Math.ceil(this.data[0].length / MOST_ROWS));
    const rows = [];
    for (let index = this.data[0].length - 1; index >= 0; index -= step) {
      const cells = this.data.slice(1).map((values) => h("td", { class: "number", text: this.format(values[index] ?? null) }));
      rows.push(h("tr", {}, h("th", { scope: "row", text: format(this.data[0][index]) }), ...cells));
    }
    this.rows.replaceChildren(...rows);
  }

  resize() {
    if (this.plot === null) return this.draw();
    const width = this.canvas.clientWidth;
    if (width > 0 && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
  }

  repaint() {
    this.plot?.redraw(false, true);
  }

  /** Forgets the chart, which is no longer shown. */
  close() {
    charts.delete(this);
    this.plot?.destroy();
    this.plot = null;
  }
}

const HOUR = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit" });
const DAY = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short" });

function timeLabels(_, values) {
  const step = values.length > 1 ? values[1] - values[0] : 60;
  if (step >= 86_400) return values.map((value) => DAY.format(value * 1000));
  return values.map((value) => {
    const at = new Date(value * 1000);
    if (step >= 3_600 && at.getHours() === 0) return DAY.format(at);
    return step >= 60 ? HOUR.format(at) : time(value);
  });
}
