// Requests to the admin server. Every failure is an ApiError with a sentence to show.

const TIMEOUT = 20_000;
const SESSION = "session";

/** A request that failed. `status` is 0 if there was no response; `problems` says more, a line each. */
export class ApiError extends Error {
  constructor(message, status = 0, problems = []) {
    super(message);
    this.status = status;
    this.problems = problems;
  }
}

/** Returns the address of `path` with the fields that are not empty. */
export function address(path, fields = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(fields)) {
    if (value !== "" && value !== null && value !== undefined && value !== 0 && value !== false) query.set(name, value);
  }
  const text = query.toString();
  return text ? `${path}?${text}` : path;
}

/** Asks for JSON. Raises ApiError. */
export const get = (path, fields) => ask("GET", address(path, fields));

/** Has something done. Raises ApiError. */
export const post = (path, body = {}) => ask("POST", path, body);

/** Deletes something. Raises ApiError. */
export const remove = (path) => ask("DELETE", path, {});

/** Returns the session: who it belongs to, its access and its second secret; null without one. Its first secret is in a
 * cookie, which no script can read. */
export function readSession() {
  try {
    return JSON.parse(localStorage.getItem(SESSION));
  } catch {
    return null;
  }
}

/** Keeps the session, or forgets it with null. */
export function keepSession(session) {
  if (session === null) localStorage.removeItem(SESSION);
  else localStorage.setItem(SESSION, JSON.stringify(session));
}

async function ask(method, url, body) {
  const options = { method, cache: "no-store", credentials: "same-origin", signal: AbortSignal.timeout(TIMEOUT) };
  if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers = { "Content-Type": "application/json" };
    const secret = readSession()?.csrf;
    if (secret) options.headers["X-CSRF-Token"] = secret;
  }
  let response;
  try {
    response = await fetch(url, options);
  } catch (error) {
    const late = error instanceof DOMException && error.name === "TimeoutError";
    throw new ApiError(late ? "The tunnel did not answer in time." : "The tunnel cannot be reached.");
  }
  const text = await response.text();
  const value = parse(text);
  if (!response.ok) throw new ApiError(value?.error ?? `The tunnel answered ${response.status}.`, response.status, value?.problems);
  return value;
}

function parse(text) {
  try {
    return text === "" ? {} : JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** Polls while the view is shown: at most every `seconds`, and more rarely where answers take long. */
export class Poll {
  constructor(seconds, request, onValue, onError) {
    this.seconds = seconds;
    this.request = request;
    this.onValue = onValue;
    this.onError = onError;
    this.running = false;
    this.timer = 0;
    this.round = 0;
  }

  start() {
    if (this.running) return;
    this.running = true;
    this.now();
  }

  stop() {
    this.running = false;
    this.round += 1;
    clearTimeout(this.timer);
  }

  /** Asks at once, such as when a filter has changed. An answer that is under way is ignored. */
  async now() {
    clearTimeout(this.timer);
    const round = (this.round += 1);
    const began = performance.now();
    try {
      const value = await this.request();
      if (round === this.round) this.onValue(value);
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (round === this.round) this.onError(error);
    } finally {
      if (round === this.round && this.running) {
        const wait = Math.max(this.seconds * 1000, 10 * (performance.now() - began));
        this.timer = setTimeout(() => this.now(), wait);
      }
    }
  }
}
