"""The bundle: a directory that is whole or absent, with a manifest and the hash of every file."""
