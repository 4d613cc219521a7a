#!/usr/bin/env bash
# In an image: does it serve? Starts `tokenflow serve` with the embedded model, runs what KubeRay's
# probes need, streams one request, and stops.
set -euo pipefail
port=${PORT:-18000}
export RAY_ADDRESS=local
echo "user: $(id -u):$(id -g), $(python --version), $(ray --version)"
bash -c 'command -v bash wget openssl'
# A login shell, in which PATH is set anew, finds Ray too.
bash -lc 'command -v ray tokenflow'
# Traces can be sent.
python -c 'import opentelemetry.exporter.otlp.proto.http.trace_exporter as otlp; print(otlp.__name__)'
tokenflow serve --port "$port" --grpc-port $((port + 1)) --host-kv-gib 0.25 --kv-tokens 4096 &
server=$!
trap 'kill $server 2>/dev/null || true; wait $server || true' EXIT
for _ in $(seq 300); do
  wget -q -O /dev/null "http://127.0.0.1:$port/health" && break
  kill -0 $server
  sleep 1
done
wget -q -O - "http://127.0.0.1:$port/-/healthz" | grep success
wget -q -O - --header 'Content-Type: application/json' --post-data \
  '{"model": "tokenflow-books", "prompt": "The sea", "max_tokens": 12, "stream": true}' \
  "http://127.0.0.1:$port/v1/completions" | tee /tmp/stream
grep -q '^data: \[DONE\]' /tmp/stream
echo "smoke test passed"
