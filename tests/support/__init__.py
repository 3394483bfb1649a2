"""What tests share: models small enough to be written at test time."""
