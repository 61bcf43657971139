"""Word lists that names and labels are made of; short, so that a line of 20 characters holds them."""

MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

SYLLABLES = (
    "ba be bi bo bu ca ce co da de di do fa fe fi fo ga go ha he ja jo ka ke ki ko la le li lo lu ma me "
    "mi mo mu na ne ni no nu pa pe po qui ra re ri ro ru sa se si so ta te ti to tu va ve vi vo wa we xa "
    "ya yo za ze zo bel bran cor dan fer gal han jin kel lam mar nor pol quen ros sal tor ven wil yor zan "
    "ster ton ley ford by"
).split()

SUFFIXES = (
    "Market Store Foods Cafe Shop Mart Books Tools Bakery Deli Garden Pharm Sport Toys Grill Bar House "
    "Trade Ltd Inc Co Sons Hall Inn Place Plus Point Stop World Depot"
).split()

ADJECTIVES = (
    "Red Blue Big Old New Hot Dry Raw Fat Tiny Dark Pale Soft Fine Gold Mini Cold Sour Wild Pink Grey "
    "Iced Thin Long Wide Flat Rich Pure Warm Cool Green White Black Fresh Sweet Small Large Salty Quick "
    "Light"
).split()

NOUNS = (
    "Tea Milk Rice Salt Soap Lamp Bread Apple Pear Plum Corn Fish Beef Ham Eggs Cake Pie Jam Oil Nuts "
    "Beans Peas Soup Stew Wrap Taco Juice Cola Water Wine Beer Gin Rum Cup Mug Fork Knife Spoon Bowl "
    "Plate Pan Pot Lid Jar Sock Shoe Boot Hat Cap Coat Belt Scarf Shirt Vest Tie Bag Purse Pen Paper Book "
    "Card Glue Tape Nail Screw Bolt Wire Plug Bulb Cable Phone Radio Clock Watch Ring Brush Comb Towel "
    "Sheet Rug Chair Table Stool Desk Shelf Box Rope Paint Brick Tile Wood Glass Sand Seed Plant Rose "
    "Tulip Lemon Lime Melon Mango Grape Berry Fig Kiwi Onion Leek Kale Chard Squash Bacon Steak Lamb Pork "
    "Tuna Crab Honey Syrup Flour Sugar Yeast Pasta Sauce Cream Curd Yogurt Butter Cheese Candle Basket "
    "Bucket Hammer Ladder Mirror Pillow Blanket Ticket Stamp Album Puzzle Ball Kite Drum Flute Piano "
    "Guitar Camera Tripod Lens Film Torch Match Razor Cotton Wool Silk Linen Denim"
).split()
