"""The C++ sources of the TensorRT plugins, packaged as data; no Python lives here."""
