"""The evaluation suite: result rows, baselines, leaderboard and pages."""
