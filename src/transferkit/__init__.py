"""The transferkit package (namespace filled in lazily)."""
