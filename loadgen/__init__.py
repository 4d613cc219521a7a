"""Load generation and the metrics of streamed text as a reader sees it."""
