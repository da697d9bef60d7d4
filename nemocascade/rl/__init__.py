"""From tasks to training sequences: episodes, verification, groups, advantages, teachers."""
