"""HTTP of one connection, whose bodies come in few pieces."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http import h11_impl

h11 = h11_impl.h11  # pyright: ignore[reportPrivateImportUsage]  # uvicorn's own

FREE_PIECES = 1024
PIECE_BYTES = 512


class PiecewiseProtocol(h11_impl.H11Protocol):
    """Refuses a body in very many tiny chunks. Each takes the event loop some 30 µs, however short it is, and comes
    before the server knows whose request it is: 256 KB of one-byte chunks would stop it for a second.

    A body may have `FREE_PIECES` pieces, and one more for each `PIECE_BYTES` bytes.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._num_pieces = self._num_bytes = 0
        self._next_event = self.conn.next_event
        self.conn.next_event = self._counted_event

    def _counted_event(self) -> Any:
        event = self._next_event()
        if isinstance(event, h11.Request):
            self._num_pieces = self._num_bytes = 0
        elif isinstance(event, h11.Data):
            self._num_pieces += 1
            self._num_bytes += len(event.data)
            if self._num_pieces > FREE_PIECES + self._num_bytes // PIECE_BYTES:
                return self._refuse()
        return event

    def _refuse(self) -> Any:
        """Close the connection, with an answer unless there is one already; nothing more is read from it."""
        if self.conn.our_state is h11.SEND_RESPONSE:
            self.send_400_response("the body comes in too many small chunks; send larger ones, or its content-length")
        else:
            self.transport.close()
        return h11.NEED_DATA
