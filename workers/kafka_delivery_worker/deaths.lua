-- What is remembered of the deaths of processes that held a message. Shared by the scripts that count them or ask.
--
-- KEYS: deaths (hash: digest of a message -> points)
--
-- A message is known by its bytes, which stay the same while it moves between lists, hands and delayed sets. No pattern
-- looks at them: they may be anybody's.
local DEATH = 10       -- points for a death that says something about the message
local UNPROVEN = 1     -- of all workers at once: so many of these ask for a look at the message alone, and never for more
local KEPT_S = 86400   -- after the last death; what is settled is forgotten at once
local MOST = 100000    -- messages that are remembered; then all are forgotten, and the deaths counted anew
local DIGESTED = 65536 -- bytes of a message that are looked at, at both of its ends, where its ids are

local function digest(item)
  if #item > DIGESTED then
    item = #item .. ':' .. string.sub(item, 1, DIGESTED / 2) .. string.sub(item, -DIGESTED / 2)
  end
  return redis.sha1hex(item)
end

local function remembers(deaths) return redis.call('HLEN', deaths) > 0 end

local function points(deaths, item) return tonumber(redis.call('HGET', deaths, digest(item)) or 0) end

local function count(deaths, item, more)
  if redis.call('HLEN', deaths) >= MOST then redis.call('UNLINK', deaths) end
  local total = redis.call('HINCRBY', deaths, digest(item), more)
  redis.call('EXPIRE', deaths, KEPT_S)
  return total
end

local function forget(deaths, item) redis.call('HDEL', deaths, digest(item)) end

-- Move a message to poison, which the parking store takes from there.
local function poisoned(deaths, poison, list, item)
  redis.call('RPUSH', poison, list .. '\n' .. item)
  forget(deaths, item)
end
