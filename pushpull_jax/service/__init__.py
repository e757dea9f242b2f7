"""A trained detector over HTTP, for one machine: `pushpull serve`."""
