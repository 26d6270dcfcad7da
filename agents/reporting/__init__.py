"""What a run leaves for people to read: metrics, logs, progress, contact sheets, a report."""
