//! `key=value,key=value`.

/// Splits `key=value,key=value`; a comma within a value is written twice.
pub fn split_pairs(text: &str) -> Vec<(String, Option<String>)> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match (c, parts.last_mut()) {
            (',', _) if chars.peek() != Some(&',') => parts.push(String::new()),
            (',', Some(part)) => {
                chars.next();
                part.push(',');
            }
            (c, Some(part)) => part.push(c),
            (_, None) => {}
        }
    }
    let pair = |p: String| match p.split_once('=') {
        Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
        None => (p, None),
    };
    parts.into_iter().filter(|p| !p.is_empty()).map(pair).collect()
}
