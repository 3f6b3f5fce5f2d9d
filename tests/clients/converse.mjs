// A conversation of the `ws` library with an echoing server: `node converse.mjs URI CA-FILE`.
// Prints what came of it as one JSON object; any failure ends it with status 1.
import { createHash, randomBytes } from "node:crypto";
import { readFileSync } from "node:fs";
import WebSocket from "ws";

const [uri, caFile] = process.argv.slice(2);
const socket = new WebSocket(uri, ["v2.echo", "v1.echo"], { ca: readFileSync(caFile), perMessageDeflate: true });
const waiting = [];
const arrived = [];
socket.on("message", (data, isBinary) => {
  const message = isBinary ? data : data.toString();
  if (waiting.length) waiting.shift()(message);
  else arrived.push(message);
});
const next = () => (arrived.length ? Promise.resolve(arrived.shift()) : new Promise((take) => waiting.push(take)));
const once = (event) => new Promise((take) => socket.once(event, (...values) => take(values)));
const digest = (data) => createHash("sha256").update(data).digest("hex");

socket.on("error", (error) => {
  console.error(error);
  process.exit(1);
});
const upgraded = once("upgrade");
await once("open");
const [response] = await upgraded;
const result = {
  subprotocol: socket.protocol,
  extensions: socket.extensions,
  status: response.statusCode,
  tls: response.socket.getProtocol(),
};

socket.send("grüße");
result.text = await next();

const sent = randomBytes(3 * 1024 * 1024);
socket.send(sent);
result.sameBytes = digest(await next()) === digest(sent);

socket.send("frag", { fin: false });
socket.send("men", { fin: false });
socket.send("ted", { fin: true });
result.fragmented = await next();

const pong = once("pong");
socket.ping("are you there");
result.pong = (await pong)[0].toString();

const closed = once("close");
socket.close(4003, "done");
const [code, reason] = await closed;
result.close = [code, reason.toString()];
console.log(JSON.stringify(result));
