"""Changing and ending running requests by their id inside the cluster, whichever ingress they
belong to."""

from __future__ import annotations

from tokenflow.cluster.reconnect import unknown_request
from tokenflow.cluster.streams import StreamManager
from tokenflow.replicas.errors import InvalidRequestError
from tokenflow.replicas.request import ReaderChange


class StreamControl:
    """What clients ask of requests that are under way. One that is not of this ingress is looked
    for on the replicas, which pass the word on to its own."""

    def __init__(self, manager: StreamManager) -> None:
        self._manager = manager

    async def cancel(self, request_id: str) -> bool:
        """End a request; its reader is told. False when there is none running of that id."""
        if not request_id:
            return False
        streams = self._manager.find(request_id)
        for stream in streams:
            self._manager.cancel(stream)
        return bool(streams) or await self._manager.control(request_id, None)

    async def change(self, request_id: str, change: ReaderChange) -> None:
        """Change a request's rate, pause or place.

        Raises InvalidRequestError: 404 when there is none running of that id, 400 when it cannot be
        changed so.
        """
        streams = self._manager.find(request_id) if request_id else []
        if change.consumed is not None and len(streams) > 1:
            raise InvalidRequestError(
                f"consumed needs a request with one choice, this one has {len(streams)}.",
                param="consumed",
            )
        for stream in streams:
            self._manager.change(stream, change)
        if streams:
            return
        if not request_id or not await self._manager.control(request_id, change):
            raise unknown_request(request_id)
