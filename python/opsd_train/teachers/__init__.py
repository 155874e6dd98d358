"""Where a teacher's opinion comes from: weights in this process, or a server."""
