"""Which student fits this hardware: candidates, their figures on the target, and where their learning curves lead."""
