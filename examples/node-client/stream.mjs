// Streams text from a TokenFlow cluster over gRPC, and goes on when the connection is lost.
//
//   npm ci && node stream.mjs 127.0.0.1:9000 "Once upon a time" --rate 20 --max-tokens 60
//
// The text goes to stdout, the last line of stderr is JSON: finish reason, usage, reconnects.
import { randomUUID } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const RECONNECT_MS = 30_000;
const LOST = new Set([grpc.status.UNAVAILABLE, grpc.status.INTERNAL, grpc.status.UNKNOWN]);

// A proxy that drops a stream makes it look cancelled.
const isLost = ({ code, details = "" }) =>
  LOST.has(code) || (code === grpc.status.CANCELLED && details.includes("RST_STREAM"));

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    rate: { type: "string" },
    "max-tokens": { type: "string", default: "60" },
    temperature: { type: "string" },
    proto: {
      type: "string",
      default: fileURLToPath(new URL("../../cluster/rpc/inference.proto", import.meta.url)),
    },
  },
});
const [target, text] = positionals;
if (!target || !text) {
  console.error("usage: node stream.mjs HOST:PORT PROMPT [--rate N] [--max-tokens N]");
  process.exit(2);
}

const { tokenflow } = grpc.loadPackageDefinition(loadSync(options.proto, { keepCase: true }));
const client = new tokenflow.v1.Inference(target, grpc.credentials.createInsecure());

const sampling = { max_tokens: Number(options["max-tokens"]), ignore_eos: true };
if (options.temperature) sampling.temperature = Number(options.temperature);
const request = { text, sampling, request_id: randomUUID(), resumable: true };
if (options.rate === "max") request.as_fast_as_possible = true;
else if (options.rate) request.token_rate = Number(options.rate);

let received = 0; // tokens
let reconnects = 0;
let last;
let lostAt;

while (!last) {
  const call =
    received || lostAt
      ? client.Resume({ request_id: request.request_id, offset: received })
      : client.Generate(request);
  try {
    for await (const message of call) {
      if (lostAt) reconnects += 1;
      lostAt = undefined;
      if (message.offset > received || (message.token_ids.length && message.offset < received)) {
        throw new Error(`token ${message.offset} came when ${received} was next`);
      }
      received += message.token_ids.length;
      process.stdout.write(message.text);
      if (message.finish_reason) last = message;
    }
    if (!last) throw Object.assign(new Error("the stream ended early"), { code: grpc.status.UNAVAILABLE });
  } catch (error) {
    lostAt ??= Date.now();
    if (!isLost(error) || Date.now() - lostAt > RECONNECT_MS) {
      console.error(`${grpc.status[error.code] ?? "ERROR"}: ${error.details ?? error.message}`);
      process.exit(1);
    }
    await sleep(100);
  }
}
client.close();
console.error(
  JSON.stringify({ tokens: received, finish_reason: last.finish_reason, usage: last.usage, reconnects }),
);
