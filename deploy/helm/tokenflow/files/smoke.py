"""`helm test`: the service answers, names its model, and streams text to its end."""

import os

import httpx

headers = {"Authorization": f"Bearer {os.environ['API_KEY']}"} if "API_KEY" in os.environ else {}
with httpx.Client(base_url=os.environ["URL"], headers=headers, timeout=60) as client:
    client.get("/health").raise_for_status()
    model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 16, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        lines = list(answer.raise_for_status().iter_lines())
events = [line for line in lines if line.startswith("data: ")]
assert len(events) > 1 and events[-1] == "data: [DONE]", lines[-3:]
print(f"{model}: {len(events) - 1} events")
