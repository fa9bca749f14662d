"""TLS contexts whose certificates are a peer's own key.

The listener shows a self-signed certificate on its Ed25519 key, and TLS 1.3 makes it prove
that it holds the key. No authority is asked and no date is checked: the dialler compares the
key with the peer id that it wants. The diallers' side of the proof is in `tcp.py`, since the
standard library can't take unknown client certificates.
"""

from __future__ import annotations

import datetime
import os
import secrets
import ssl
import tempfile
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

from shoal.base.ids import PeerId
from shoal.net.identity import Identity, is_weak

_NOT_BEFORE: Final = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
_NOT_AFTER: Final = datetime.datetime(9999, 12, 31, tzinfo=datetime.UTC)


def certificate_of(identity: Identity) -> x509.Certificate:
    """The peer's certificate: the same for the same key, and valid for ever."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "shoal")])
    builder = x509.CertificateBuilder(name, name, identity.key.public_key(), 1)
    return (
        builder.not_valid_before(_NOT_BEFORE).not_valid_after(_NOT_AFTER).sign(identity.key, None)
    )


def der_of(certificate: x509.Certificate) -> bytes:
    """The certificate's bytes, as TLS carries them."""
    return certificate.public_bytes(Encoding.DER)


def peer_of_certificate(der: bytes) -> PeerId | None:
    """The peer whose key a certificate holds; None if it is no sound Ed25519 key."""
    try:
        key = x509.load_der_x509_certificate(der).public_key()
    except (ValueError, UnsupportedAlgorithm):
        return None
    if not isinstance(key, Ed25519PublicKey) or is_weak(key.public_bytes_raw()):
        return None
    return PeerId(key.public_bytes_raw())


def client_context() -> ssl.SSLContext:
    """TLS 1.3 that takes any certificate; the caller must compare the key in it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def server_context(identity: Identity) -> ssl.SSLContext:
    """TLS 1.3 with the peer's certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # a resumed connection would show no certificate
    _load(context, identity)
    return context


def _load(context: ssl.SSLContext, identity: Identity) -> None:
    """The standard library reads keys from files only: one that nobody else can use."""
    password = secrets.token_bytes(16).hex().encode("ascii")
    encryption = BestAvailableEncryption(password)
    key = identity.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    certificate = certificate_of(identity).public_bytes(Encoding.PEM)
    descriptor, path = tempfile.mkstemp(prefix="shoal-", suffix=".pem")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(key + certificate)
        context.load_cert_chain(path, password=password)
    finally:
        os.unlink(path)
