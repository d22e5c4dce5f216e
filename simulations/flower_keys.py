"""Make what a SuperLink and its SuperNodes need to trust each other: keys and certificates, in one folder.

    python simulations/flower_keys.py keys --supernodes 2 --host superlink.example.org

writes ``ca.crt`` (whom everybody trusts), ``server.pem`` and ``server.key`` (the SuperLink's certificate, for
localhost, 127.0.0.1 and every --host), and for each SuperNode ``supernode-0`` (its private key), ``supernode-0.pub``
(to register), ``supernode-0.pem`` and ``supernode-0.key`` (its certificate towards its own processes, for localhost and
127.0.0.1 only). The authority's own key is forgotten: nobody can sign a further certificate with it. Meant for trials:
who has an authority takes its certificates.
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import os
import sys
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LOOPBACK: tuple[str, ...] = ("localhost", "127.0.0.1")


def make_keys(folder: Path, supernodes: int, hosts: tuple[str, ...] = (), *, days: int = 365) -> None:
    """Write the files; private ones can be read by their owner only.

    Raises
    ------
    FileExistsError
        One is there already: a key that others rely on is not replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    authority = _new_key()
    issuer = _name("fedmerge trial authority")
    _write(folder / "ca.crt", _pem(_certificate(issuer, issuer, authority, authority, days)))
    for name, served in [("server", hosts), *((f"supernode-{number}", ()) for number in range(supernodes))]:
        key = _new_key()
        names = [_alternative(host) for host in dict.fromkeys(LOOPBACK + served)]
        _write(folder / f"{name}.pem", _pem(_certificate(_name(name), issuer, key, authority, days, names)))
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        _write(folder / f"{name}.key", private, secret=True)
    for number in range(supernodes):
        make_supernode_key(folder / f"supernode-{number}")


def make_supernode_key(path: Path) -> None:
    """A SuperNode's key pair: the private key at `path`, the public one beside it with ``.pub``."""
    key = _new_key()
    _write(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), secret=True)
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    _write(path.with_name(f"{path.name}.pub"), public + b"\n")


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    days: int,
    names: list[x509.GeneralName] | None = None,
) -> x509.Certificate:
    """An authority's certificate where there are no `names`, a server's where there are."""
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Clocks differ.
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=names is None, path_length=0 if names is None else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .add_extension(_usage(authority=names is None), critical=True)
    )
    if names is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    return builder.sign(signer, hashes.SHA384())


def _usage(*, authority: bool) -> x509.KeyUsage:
    unused = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
        **dict.fromkeys(unused, False),
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _write(path: Path, content: bytes, *, secret: bool = False) -> None:
    # Created with its final rights: a key must not be readable even for a moment.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--supernodes", type=int, default=2, metavar="K")
    parser.add_argument("--host", action="append", default=[], help="name or address of the SuperLink; may be repeated")
    parser.add_argument("--days", type=int, default=365, help="how long the certificates hold")
    arguments = parser.parse_args()
    try:
        make_keys(arguments.folder, arguments.supernodes, tuple(arguments.host), days=arguments.days)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*sorted(path.name for path in arguments.folder.iterdir()), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
