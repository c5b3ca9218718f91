"""The network interface of a machine by which gloo connects ranks of several machines."""

import fcntl
import ipaddress
import os
import socket
import struct

# Request of Linux for the address of an interface (<linux/sockios.h>).
_GET_ADDRESS = 0x8915


def choose_interface(address: str) -> None:
    """Have gloo use the interface that reaches rank 0, where it would take a loopback interface.

    gloo listens at the address that the machine's own name stands for. On Debian and Ubuntu that is
    127.0.1.1, where no other machine reaches it. A choice of the user's is left as it is.

    Args:
        address: Name or address at which the ranks meet.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or not _is_loopback(socket.gethostname()):
        return
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # nothing is sent: it only asks for the way
            own = probe.getsockname()[0]
    except OSError:
        return
    name = None if ipaddress.ip_address(own).is_loopback else _interface_of(own)
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _is_loopback(name: str) -> bool:
    """Return whether a name stands for a loopback address, or for none at all."""
    try:
        return ipaddress.ip_address(socket.gethostbyname(name)).is_loopback
    except OSError:
        return True


def _interface_of(address: str) -> str | None:
    """Return the name of the interface with an IPv4 address; None if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                found = fcntl.ioctl(probe.fileno(), _GET_ADDRESS, request)
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None
