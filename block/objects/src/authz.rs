//! Who may connect: `authz-simple`, `authz-list` and `authz-list-file` objects, asked with the name in a client's certificate.

use std::path::PathBuf;

use serde_json::{Map, Value};

use crate::{Fields, ObjectError, bad};

/// Most rules of a list.
const MAX_RULES: usize = 65_536;

/// How a rule's pattern is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    /// Byte for byte.
    Exact,
    /// `*` is any text and `?` any character.
    Glob,
}

#[derive(Debug, Clone)]
struct Rule {
    pattern: String,
    allow: bool,
    format: Format,
}

/// Rules, of which the first that fits decides.
#[derive(Debug, Clone)]
struct List {
    rules: Vec<Rule>,
    /// What holds where none fits.
    allow: bool,
}

/// Decides who may connect.
#[derive(Debug)]
pub enum Authz {
    /// One name.
    Simple(String),
    /// A list of rules.
    List(AuthzList),
    /// A list of rules in a file.
    File(AuthzFile),
}

/// The rules of an `authz-list`.
#[derive(Debug)]
pub struct AuthzList(List);

/// The file of an `authz-list-file`.
#[derive(Debug)]
pub struct AuthzFile {
    path: PathBuf,
    /// What it said when the object was made; `None` if it is read whenever it is asked.
    fixed: Option<List>,
}

/// True if `text` is of the pattern: `*` stands for any text, `?` for any character.
fn glob(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    let (mut p, mut t) = (0, 0);
    // The last star, and how much of the text it has taken.
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(c) if *c == '?' || Some(c) == text.get(t) => {
                p += 1;
                t += 1;
            }
            _ => match &mut star {
                Some((at, taken)) => {
                    *taken += 1;
                    (p, t) = (*at + 1, *taken);
                }
                None => return false,
            },
        }
    }
    pattern.get(p..).unwrap_or_default().iter().all(|c| *c == '*')
}

fn policy(value: Option<&Value>, default: bool) -> Result<bool, ObjectError> {
    match value.map(Value::as_str) {
        None => Ok(default),
        Some(Some("allow")) => Ok(true),
        Some(Some("deny")) => Ok(false),
        _ => Err(bad("Parameter 'policy' is 'allow' or 'deny'")),
    }
}

fn rule(value: &Value) -> Result<Rule, ObjectError> {
    let Value::Object(map) = value else { return Err(bad("a rule is an object with 'match' and 'policy'")) };
    if let Some(key) = map.keys().find(|k| !["match", "policy", "format"].contains(&k.as_str())) {
        return Err(bad(format!("a rule does not have the key '{key}'")));
    }
    let Some(Value::String(pattern)) = map.get("match") else {
        return Err(bad("Parameter 'match' is missing"));
    };
    let format = match map.get("format").map(Value::as_str) {
        None | Some(Some("exact")) => Format::Exact,
        Some(Some("glob")) => Format::Glob,
        _ => return Err(bad("Parameter 'format' is 'exact' or 'glob'")),
    };
    if !map.contains_key("policy") {
        return Err(bad("Parameter 'policy' is missing"));
    }
    Ok(Rule { pattern: pattern.clone(), allow: policy(map.get("policy"), false)?, format })
}

impl List {
    fn from_values(default: Option<&Value>, rules: Option<&Value>) -> Result<Self, ObjectError> {
        let rules = match rules {
            None => Vec::new(),
            Some(Value::Array(rules)) if rules.len() <= MAX_RULES => {
                rules.iter().map(rule).collect::<Result<_, _>>()?
            }
            Some(_) => return Err(bad("Parameter 'rules' is a list of rules")),
        };
        Ok(Self { rules, allow: policy(default, false)? })
    }

    fn read(path: &std::path::Path) -> Result<Self, ObjectError> {
        let text = std::fs::read_to_string(path);
        let text = text.map_err(|source| ObjectError::Read { path: path.display().to_string(), source })?;
        let value: Value =
            serde_json::from_str(&text).map_err(|e| bad(format!("{}: {e}", path.display())))?;
        let Value::Object(map) = &value else {
            return Err(bad(format!("{}: it is no object", path.display())));
        };
        Self::from_values(map.get("policy"), map.get("rules"))
    }

    fn allows(&self, identity: &str) -> bool {
        let fits = |rule: &&Rule| match rule.format {
            Format::Exact => rule.pattern == identity,
            Format::Glob => glob(&rule.pattern, identity),
        };
        self.rules.iter().find(fits).map_or(self.allow, |rule| rule.allow)
    }
}

impl Authz {
    /// An `authz-simple` object: `identity`.
    pub(crate) fn simple(fields: &mut Fields) -> Result<Self, ObjectError> {
        let identity = fields.text("identity")?.ok_or_else(|| bad("identity property must be set"))?;
        Ok(Self::Simple(identity))
    }

    /// An `authz-list` object: `policy`, and `rules` as a list or as `rules.N.KEY`.
    pub(crate) fn list(fields: &mut Fields) -> Result<Self, ObjectError> {
        let default = fields.text("policy")?.map(Value::String);
        let rules = match fields.take("rules") {
            Some(rules) => rules,
            None => dotted(fields)?,
        };
        List::from_values(default.as_ref(), Some(&rules)).map(AuthzList).map(Self::List)
    }

    /// An `authz-list-file` object: `filename`, `refresh`.
    pub(crate) fn file(fields: &mut Fields) -> Result<Self, ObjectError> {
        let path = fields.text("filename")?.ok_or_else(|| bad("filename not provided"))?;
        let path = PathBuf::from(path);
        // It has to be right now, at least.
        let list = List::read(&path)?;
        let refresh = fields.flag("refresh")?.unwrap_or(true);
        Ok(Self::File(AuthzFile { path, fixed: (!refresh).then_some(list) }))
    }

    /// The type of the object.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Simple(_) => "authz-simple",
            Self::List(_) => "authz-list",
            Self::File(_) => "authz-list-file",
        }
    }

    /// True if whoever has this name may connect. Who has none may not.
    ///
    /// # Errors
    /// [`ObjectError`] if rules cannot be read; then nobody may.
    pub fn allows(&self, identity: Option<&str>) -> Result<bool, ObjectError> {
        let Some(identity) = identity else { return Ok(false) };
        match self {
            Self::Simple(name) => Ok(name == identity),
            Self::List(AuthzList(list)) | Self::File(AuthzFile { fixed: Some(list), .. }) => {
                Ok(list.allows(identity))
            }
            Self::File(file) => List::read(&file.path).map(|list| list.allows(identity)),
        }
    }
}

/// The rules of keys `rules.N.KEY`, in order, without a gap.
fn dotted(fields: &mut Fields) -> Result<Value, ObjectError> {
    let mut rules: Vec<Map<String, Value>> = Vec::new();
    for key in fields.keys("rules.") {
        let parts: Vec<&str> = key.splitn(3, '.').collect();
        let number = parts.get(1).and_then(|n| n.parse::<usize>().ok()).filter(|n| *n < MAX_RULES);
        let (Some(number), Some(name)) = (number, parts.get(2)) else {
            return Err(bad(format!("Object 'authz-list' does not support the option '{key}'")));
        };
        if rules.len() <= number {
            rules.resize_with(number + 1, Map::new);
        }
        if let (Some(rule), Some(value)) = (rules.get_mut(number), fields.take(&key)) {
            rule.insert((*name).to_owned(), value);
        }
    }
    if rules.iter().any(Map::is_empty) {
        return Err(bad("the rules of 'authz-list' are numbered from 0 without a gap"));
    }
    Ok(Value::Array(rules.into_iter().map(Value::Object).collect()))
}

#[cfg(test)]
mod tests {
    use crate::Objects;

    fn asked(text: &str, names: &[&str]) -> Vec<bool> {
        let objects = Objects::default();
        objects.add_text(text).expect("an object");
        let authz = objects.authz("a").expect("it");
        assert!(!authz.allows(None).expect("rules"), "nobody has no name");
        names.iter().map(|n| authz.allows(Some(n)).expect("rules")).collect()
    }

    #[test]
    fn the_first_rule_that_fits_decides() {
        let names = ["CN=fred", "CN=bob", "CN=danger,O=x", "CN=dan"];
        assert_eq!(asked("authz-simple,id=a,identity=CN=bob", &names), [false, true, false, false]);
        let rules = "authz-list,id=a,policy=deny,rules.0.match=CN=fred,rules.0.policy=allow,rules.1.match=CN=danger*,rules.1.policy=deny,rules.1.format=glob,rules.2.match=CN=d?n*,rules.2.policy=allow,rules.2.format=glob";
        assert_eq!(asked(rules, &names), [true, false, false, true]);
        let json = r#"{"qom-type":"authz-list","id":"a","policy":"allow","rules":[{"match":"CN=bob","policy":"deny"}]}"#;
        assert_eq!(asked(json, &names), [true, false, true, true]);
        assert_eq!(asked("authz-list,id=a", &names), [false; 4]);
    }

    #[test]
    fn a_file_is_read_anew_unless_it_is_not_to_be() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("rules.json");
        let write = |policy: &str| std::fs::write(&path, format!(r#"{{"policy":"{policy}","rules":[]}}"#));
        write("allow").expect("file");
        let objects = Objects::default();
        for (id, refresh) in [("live", "on"), ("still", "off")] {
            let text = format!("authz-list-file,id={id},refresh={refresh},filename={}", path.display());
            objects.add_text(&text).expect("an object");
        }
        let asks = |id: &str| objects.authz(id).and_then(|a| a.allows(Some("x")));
        assert!(asks("live").expect("rules") && asks("still").expect("rules"));
        write("deny").expect("file");
        assert!(!asks("live").expect("rules") && asks("still").expect("rules"));
        std::fs::write(&path, "{").expect("file");
        assert!(asks("live").is_err() && asks("still").expect("rules"));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for text in [
            "authz-simple,id=a",
            "authz-list,id=a,policy=maybe",
            "authz-list,id=a,rules.0.policy=allow",
            "authz-list,id=a,rules.0.match=x",
            "authz-list,id=a,rules.1.match=x,rules.1.policy=allow",
            "authz-list,id=a,rules.x.match=x",
            "authz-list,id=a,rules.0.match=x,rules.0.policy=allow,rules.0.format=regex",
            "authz-list,id=a,rules.0.match=x,rules.0.policy=allow,rules.0.colour=red",
            "authz-list-file,id=a",
            "authz-list-file,id=a,filename=/nonexistent",
            "authz-pam,id=a,service=x",
            "tls-creds-psk,id=a,dir=/tmp",
        ] {
            assert!(Objects::default().add_text(text).is_err(), "{text}");
        }
        assert!(!super::glob("*a*a*a*b", &"a".repeat(5000)));
    }
}
