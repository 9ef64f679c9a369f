"""Which consumers compute the exported norms to the last bit, and what each word costs: docs/targets.md."""
