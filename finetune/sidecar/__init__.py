"""The sidecar process: when rounds begin, how they step back for serving, and who hears what came of them."""
