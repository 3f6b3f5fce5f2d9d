// Numbers, units and times as people read them: the same everywhere on the page.

const WHOLE = new Intl.NumberFormat("en-GB", { maximumFractionDigits: 0 });
const TIME = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const MOMENT = new Intl.DateTimeFormat("en-GB", {
  year: "numeric", month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit",
});
const DAY = new Intl.DateTimeFormat("en-GB", { year: "numeric", month: "short", day: "numeric" });
const UNKNOWN = "–";

const isKnown = (value) => typeof value === "number" && Number.isFinite(value);

/** A count: 12,345. */
export const count = (value) => (isKnown(value) ? WHOLE.format(value) : UNKNOWN);

/** A count with its noun: "1 tunnel", "2 tunnels". */
export const counted = (value, one, many = `${one}s`) => `${count(value)} ${value === 1 ? one : many}`;

/** A number with about three significant digits: 0.25, 3.5, 120. */
export function figure(value) {
  if (!isKnown(value)) return UNKNOWN;
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 1) return value.toFixed(2);
  if (size < 100) return value.toFixed(1);
  return WHOLE.format(value);
}

/** So many per second. */
export const perSecond = (value) => `${figure(value)}/s`;

/** Bytes in decimal units: 1.2 MB. */
export function bytes(value) {
  if (!isKnown(value)) return UNKNOWN;
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let size = value;
  let unit = 0;
  while (Math.abs(size) >= 1000 && unit < units.length - 1) {
    size /= 1000;
    unit += 1;
  }
  return `${size.toFixed(unit === 0 || Math.abs(size) >= 100 ? 0 : 1)} ${units[unit]}`;
}

/** Bytes per second. */
export const bytesPerSecond = (value) => `${bytes(value)}/s`;

/** A latency: 850 µs, 1.2 ms, 3.4 s. */
export function latency(seconds) {
  if (!isKnown(seconds)) return UNKNOWN;
  if (seconds === 0) return "0 ms";
  if (seconds < 0.001) return `${Math.round(seconds * 1e6)} µs`;
  if (seconds < 0.1) return `${(seconds * 1000).toFixed(1)} ms`;
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  return `${seconds.toFixed(1)} s`;
}

/** A length of time in its two largest units: 3 d 4 h, 5 min 3 s. */
export function duration(seconds) {
  if (!isKnown(seconds)) return UNKNOWN;
  const whole = Math.max(0, Math.floor(seconds));
  const parts = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const first = parts.findIndex(([length]) => whole >= length);
  if (first === -1) return "0 s";
  const [length, unit] = parts[first];
  const rest = parts[first + 1];
  const more = rest ? Math.floor((whole % length) / rest[0]) : 0;
  return `${Math.floor(whole / length)} ${unit}${more ? ` ${more} ${rest[1]}` : ""}`;
}

/** A share, 0 to 1, as a percentage. */
export const percent = (share) => (isKnown(share) ? `${(share * 100).toFixed(share < 0.1 ? 1 : 0)} %` : UNKNOWN);

/** A Unix time as the time of day. */
export const time = (at) => (isKnown(at) ? TIME.format(at * 1000) : UNKNOWN);

/** A Unix time with its day. */
export const moment = (at) => (isKnown(at) ? MOMENT.format(at * 1000) : UNKNOWN);

/** The day of a Unix time. */
export const day = (at) => (isKnown(at) ? DAY.format(at * 1000) : UNKNOWN);

/** How long ago a Unix time was. */
export const ago = (at, now) => (isKnown(at) ? `${duration(Math.max(0, now - at))} ago` : UNKNOWN);
