"""The OpenAI-compatible HTTP protocol: parsing, errors, framing. No Ray, no engine state."""
