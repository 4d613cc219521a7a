"""Scheduling policies and the playback model: plain Python over plain data, `now` passed in."""
