"""What runs as root on every host: migd, guards, keepers, and the deputies at home."""
