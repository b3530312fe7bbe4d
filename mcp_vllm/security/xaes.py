"""XAES-256-GCM: AES-256-GCM with a nonce of 192 bits (C2SP, https://c2sp.org/XAES-256-GCM).

Of the key and the first half of the nonce a key of its own is derived for AES-256-GCM, which takes
the second half. A nonce of 96 bits that nobody counts allows 2^32 messages a key (NIST SP 800-38D),
which a fleet of agents that share a key could pass unnoticed; 192 bits set no bound that matters.
"""

from __future__ import annotations

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES = 32
NONCE_BYTES = 24
TAG_BYTES = 16
_HALF = NONCE_BYTES // 2
_BLOCK_BITS = 128
_REDUCTION = 0b10000111


def encrypt(key: bytes, nonce: bytes, plaintext: bytes, associated: bytes) -> bytes:
    """Ciphertext and tag. A nonce never comes back with another plaintext or associated data."""
    return AESGCM(_derived(key, nonce)).encrypt(nonce[_HALF:], plaintext, associated)


def decrypt(key: bytes, nonce: bytes, ciphertext: bytes, associated: bytes) -> bytes:
    """The plaintext. Raises cryptography.exceptions.InvalidTag."""
    return AESGCM(_derived(key, nonce)).decrypt(nonce[_HALF:], ciphertext, associated)


def _derived(key: bytes, nonce: bytes) -> bytes:
    """The key of one message: NIST SP 800-108 in counter mode, with AES-CMAC."""
    if len(key) != KEY_BYTES or len(nonce) != NONCE_BYTES:
        raise ValueError("XAES-256-GCM takes a key of 32 bytes and a nonce of 24")
    block = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()
    zero = int.from_bytes(block.update(bytes(16)), "big")
    doubled = (zero << 1) & ((1 << _BLOCK_BITS) - 1)
    subkey = doubled ^ (_REDUCTION if zero >> (_BLOCK_BITS - 1) else 0)
    messages = (bytes([0, counter]) + b"X\0" + nonce[:_HALF] for counter in (1, 2))
    return b"".join(
        block.update((int.from_bytes(each, "big") ^ subkey).to_bytes(16, "big"))
        for each in messages
    )
