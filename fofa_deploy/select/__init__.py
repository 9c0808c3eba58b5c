"""What a student is chosen by: candidates, their figures on the target, and where their learning curves lead."""
