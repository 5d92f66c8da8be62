"""Images for many prompts, in one process or several: written as they come, resumed where an older run stopped."""
