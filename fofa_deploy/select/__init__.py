"""Which student fits this hardware."""
