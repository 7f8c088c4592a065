"""What makes DVC quicker; nothing else imports it."""
