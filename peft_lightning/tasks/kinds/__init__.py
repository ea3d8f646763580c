"""The kinds of task, one small file each; ``base`` holds what they share."""
