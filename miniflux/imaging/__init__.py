"""Images: reading and saving, masks, control images, previews, watermark and metadata."""
