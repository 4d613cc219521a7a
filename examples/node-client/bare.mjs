// The same protocol without any package: gRPC is HTTP/2 with length-prefixed protobuf messages. For
// those who want to see what goes over the wire; `stream.mjs` is what one would use.
//
//   node bare.mjs 127.0.0.1:9000 "Once upon a time" 60
//
// The text goes to stdout, the last line of stderr is JSON: tokens, finish reason, gRPC status.
import http2 from "node:http2";

const [target, text, maxTokens = "60"] = process.argv.slice(2);

function varint(value) {
  const bytes = [];
  for (; value > 127; value = Math.floor(value / 128)) bytes.push((value % 128) | 128);
  return Buffer.from([...bytes, value]);
}

const lengthDelimited = (field, data) =>
  Buffer.concat([varint((field << 3) | 2), varint(data.length), data]);
const number = (field, value) => Buffer.concat([varint(field << 3), varint(value)]);

// GenerateRequest: text = 2, sampling = 6 {max_tokens = 1, temperature = 3 (0.0), ignore_eos = 15}.
const sampling = Buffer.concat([
  number(1, Number(maxTokens)),
  varint((3 << 3) | 1),
  Buffer.alloc(8),
  number(15, 1),
]);
const message = Buffer.concat([
  lengthDelimited(2, Buffer.from(text)),
  lengthDelimited(6, sampling),
]);
const head = Buffer.alloc(5); // not compressed, and the length
head.writeUInt32BE(message.length, 1);

function* fields(data) {
  let at = 0;
  const read = () => {
    let value = 0;
    for (let factor = 1; ; factor *= 128) {
      const byte = data[at++];
      value += (byte & 127) * factor;
      if (byte < 128) return value;
    }
  };
  while (at < data.length) {
    const key = read();
    if ((key & 7) === 0) yield [key >> 3, read()];
    else {
      const size = { 1: 8, 5: 4 }[key & 7] ?? read();
      yield [key >> 3, data.subarray(at, (at += size))];
    }
  }
}

let tokens = 0;
let finishReason = "";
let status;

function take(response) {
  for (const [field, value] of fields(response)) {
    if (field === 3) tokens += value.reduce((count, byte) => count + (byte < 128), 0);
    else if (field === 4) process.stdout.write(value.toString());
    else if (field === 7) finishReason = value.toString();
  }
}

const session = http2.connect(`http://${target}`);
const call = session.request({
  ":method": "POST",
  ":path": "/tokenflow.v1.Inference/Generate",
  "content-type": "application/grpc",
  te: "trailers",
});
call.on("response", (headers) => (status = headers["grpc-status"])); // only trailers: refused
call.on("trailers", (trailers) => (status = trailers["grpc-status"]));
call.end(Buffer.concat([head, message]));

let rest = Buffer.alloc(0);
for await (const data of call) {
  rest = Buffer.concat([rest, data]);
  while (rest.length >= 5 && rest.length >= 5 + rest.readUInt32BE(1)) {
    const end = 5 + rest.readUInt32BE(1);
    take(rest.subarray(5, end));
    rest = rest.subarray(end);
  }
}
session.close();
console.error(JSON.stringify({ tokens, finish_reason: finishReason, status: Number(status) }));
process.exitCode = status === "0" ? 0 : 1;
