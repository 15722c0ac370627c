"""The Ray Serve application: gateway -> encoders -> router (docs/serving.md)."""
