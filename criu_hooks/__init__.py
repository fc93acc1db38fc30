"""Everything that talks to CRIU or looks at a process the way CRIU does. Knows nothing of hosts."""
