"""Sessions to and from archives: one portable, checksummed file (`session.archive`)."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from mcp_vllm.agent.context import AgentContext
from mcp_vllm.agent.encoder import Encoder
from mcp_vllm.agent.received import check_received, keep_verified
from mcp_vllm.agent.session_error import NOTHING_HERE, SessionError
from mcp_vllm.agent.uploads import Upload
from mcp_vllm.codec import CodecError
from mcp_vllm.security.seals import SealError, is_sealed
from mcp_vllm.session.archive import (
    MAX_FRAME_BYTES,
    ArchivedFrame,
    ArchiveError,
    ArchiveReader,
    ArchiveWriter,
)
from mcp_vllm.session.manifest import Manifest, SessionKey
from mcp_vllm.store.ram import ChunkKey


class SessionFiles:
    """Owned by the agent's event loop."""

    def __init__(self, context: AgentContext, encoder: Encoder) -> None:
        self._context = context
        self._encoder = encoder

    async def export(self, manifest: Manifest) -> AsyncIterator[bytes]:
        """The session, which is awake, as an archive, piece by piece.

        Raises:
            SessionError: before the first piece, where nothing of it is here.
        """
        names = list(self._context.held(manifest))
        if not names:
            raise SessionError(409, NOTHING_HERE)
        writer = ArchiveWriter()
        yield writer.start(manifest)
        for name in names:
            chunk = await self._context.tiers.get(name)
            if chunk is None:
                raise SessionError(409, "a chunk of the session was evicted meanwhile: try again")
            try:
                frame = await self._encoder.frame_for(name, chunk, manifest.key.tenant)
            except SealError as error:
                raise SessionError(409, f"a block that it shares with others is {error}") from error
            for piece in writer.add(ArchivedFrame(frame, chunk.loss)):
                yield piece
        yield writer.end()

    async def import_archive(
        self,
        pieces: AsyncIterator[bytes],
        owner: SessionKey | None = None,
        only_tenant: str | None = None,
        upload: Upload | None = None,
    ) -> Manifest:
        """Take over a session from an archive, as `owner` or under its own name.

        Chunks are verified and kept as they come; the session appears when the archive has proved
        whole. `upload` is one that goes on where it stopped. Raises SessionError: 400 for a bad
        archive, 403 for a tenant other than `only_tenant` (None: any), 409 when the session is here
        already, 507 when it does not fit.
        """
        upload = upload or Upload()
        reader, arrived = upload.reader, upload.arrived
        try:
            async for piece in pieces:
                upload.is_waiting = False
                for archived in reader.feed(piece):
                    _check_tenant(reader, owner, only_tenant)
                    arrived.add(await self._keep(reader, archived, owner))
                upload.received += len(piece)
                upload.is_waiting = True
            reader.close()
            _check_tenant(reader, owner, only_tenant)
        except (ArchiveError, CodecError) as error:
            raise SessionError(400, str(error)) from error
        manifest = reader.manifest
        assert manifest is not None
        manifest = msgspec.structs.replace(
            manifest, key=owner or manifest.key, parked=False, replica_of=""
        )
        if arrived - set(manifest.chunk_keys()):
            raise SessionError(400, "the archive holds chunks that its manifest does not name")
        present = self._context.sessions.get(manifest.key)
        if present is not None and not present.parked:
            raise SessionError(409, f"session {manifest.key.session_id} exists already")
        missing = arrived - {name.key for name in self._context.held(manifest)}
        if missing:
            text = f"{len(missing)} of the session's chunks do not fit into the memory"
            raise SessionError(507, text)
        self._context.appear(manifest)
        return manifest

    async def _keep(
        self, reader: ArchiveReader, archived: ArchivedFrame, owner: SessionKey | None
    ) -> bytes:
        """Verify and store one chunk of an archive; returns its key."""
        manifest = reader.manifest
        assert manifest is not None
        context, tenant = self._context, (owner or manifest.key).tenant
        lossy = context.config.codec.lossy_for(tenant, salted=False)
        frame = archived.frame
        header, loss = check_received(frame, archived.loss, MAX_FRAME_BYTES, lossy)
        name = ChunkKey(manifest.namespace, header.key, tenant)
        if is_sealed(frame) and manifest.key.tenant != tenant:
            frame = await context.in_pool(
                context.seals.reseal, frame, name.namespace, manifest.key.tenant, tenant, loss
            )
        await keep_verified(context, name, frame, header, loss)
        return header.key


def _check_tenant(reader: ArchiveReader, owner: SessionKey | None, only_tenant: str | None) -> None:
    """Whether the archive may be imported as that tenant's. Raises SessionError."""
    assert reader.manifest is not None
    if only_tenant is not None and (owner or reader.manifest.key).tenant != only_tenant:
        raise SessionError(403, "a session of another tenant cannot be imported")
