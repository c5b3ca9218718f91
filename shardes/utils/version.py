"""The version of shardes, apart from the package's front so that any module may import it."""

VERSION = "0.2.0"
