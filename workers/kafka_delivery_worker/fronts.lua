-- Whose turn it is. KEYS: lists; ARGV: bytes that an id may take, places of a message to look at
-- Reply: for each list the JSON text that begins with the task id of the message that is taken next, "" where it has none,
-- nil for an empty list. The message itself, which may be large, stays here.
local NAME = '"correlation_id"'
local bytes, looks = tonumber(ARGV[1]), tonumber(ARGV[2])

-- What follows the last of these names that a text follows; task_ids.py has the same rule, and says why. It is looked for
-- from the end: a stranger's message may hold thousands.
local function id_in(item)
  local turned, name, at = string.reverse(item), string.reverse(NAME), 1
  for _ = 1, looks do
    local from = string.find(turned, name, at, true)
    if not from then return '' end
    local text = string.match(item, '^[ \t\r\n]*:[ \t\r\n]*()"', #item - from + 2)
    if text then return string.sub(item, text, text + bytes - 1) end
    at = from + #name
  end
  return ''
end

local ids = {}
for place, list in ipairs(KEYS) do
  local item = redis.call('LINDEX', list, -1)
  ids[place] = item and id_in(item)
end
return ids
